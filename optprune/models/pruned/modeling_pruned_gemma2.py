"""Gemma 2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.gemma2 import modeling_gemma2 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedGemma2Config(stock.Gemma2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_gemma2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGemma2Attention(PrunedAttention, stock.Gemma2Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def options(self):
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


class PrunedGemma2DecoderLayer(PrunedBlock, stock.Gemma2DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedGemma2Attention
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

    def forward(self, hidden_states, **kwargs):
        hidden_states = super().forward(hidden_states, **kwargs)
        # transformers 4.57 passes whether weights are needed, and takes the first of a tuple.
        return (hidden_states, None) if "output_attentions" in kwargs else hidden_states


class PrunedGemma2ForCausalLM(PrunedModel, stock.Gemma2ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGemma2Config
    block_class = PrunedGemma2DecoderLayer
    _no_split_modules = ["PrunedGemma2DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGemma2Config.register_for_auto_class()
PrunedGemma2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
