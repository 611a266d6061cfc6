"""LFM2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.lfm2 import modeling_lfm2 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel, resized
from .pruned_recurrent import PrunedHybridBlock


class PrunedLfm2Config(stock.Lfm2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_lfm2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedLfm2Attention(PrunedAttention, stock.Lfm2Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"
    attention_dropout = 0.0
    # The layers by the names that other families have.
    o_proj = property(lambda self: self.out_proj)
    q_norm = property(lambda self: self.q_layernorm)
    k_norm = property(lambda self: self.k_layernorm)

    def shrink(self, queries, keys, values, mixed):
        self.q_proj = resized(self.q_proj, outputs=queries)
        self.k_proj = resized(self.k_proj, outputs=keys)
        self.v_proj = resized(self.v_proj, outputs=values)
        self.out_proj = resized(self.out_proj, inputs=mixed)


class PrunedLfm2DecoderLayer(PrunedHybridBlock, stock.Lfm2DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedLfm2Attention
    recurrent = "conv"
    counted = ()
    attention_norms = ("operator_norm", None)
    mlp_norms = ("ffn_norm", None)
    mlp_module = "feed_forward"

    def shrink_mlp(self, width):
        self.mlp.w1 = resized(self.mlp.w1, outputs=width)
        self.mlp.w3 = resized(self.mlp.w3, outputs=width)
        self.mlp.w2 = resized(self.mlp.w2, inputs=width)


class PrunedLfm2ForCausalLM(PrunedModel, stock.Lfm2ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedLfm2Config
    block_class = PrunedLfm2DecoderLayer
    _no_split_modules = ["PrunedLfm2DecoderLayer"]


# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedLfm2Config.register_for_auto_class()
PrunedLfm2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
