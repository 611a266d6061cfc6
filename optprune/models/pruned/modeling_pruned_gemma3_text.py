"""Gemma 3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.gemma3 import modeling_gemma3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedGemma3Config(stock.Gemma3TextConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_gemma3_text"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGemma3Attention(PrunedAttention, stock.Gemma3Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"

    def options(self):
        return {"sliding_window": self.sliding_window}


class PrunedGemma3DecoderLayer(PrunedBlock, stock.Gemma3DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedGemma3Attention
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        if position_embeddings is None:  # transformers 4.57 passes those of both kinds of attention
            near, far = kwargs.pop("position_embeddings_local"), kwargs.pop("position_embeddings_global")
            sliding = self.self_attn is not None and self.self_attn.is_sliding
            states = super().forward(hidden_states, position_embeddings=near if sliding else far, **kwargs)
            return states, None
        return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)


class PrunedGemma3ForCausalLM(PrunedModel, stock.Gemma3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGemma3Config
    block_class = PrunedGemma3DecoderLayer
    _no_split_modules = ["PrunedGemma3DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGemma3Config.register_for_auto_class()
PrunedGemma3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
