"""EXAONE 4 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.exaone4 import modeling_exaone4 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedExaone4Config(stock.Exaone4Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_exaone4"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedExaone4Attention(PrunedAttention, stock.Exaone4Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"

    @property
    def use_rope(self):
        """Whether queries and keys are rotated: not in blocks that see all tokens beside blocks with a window."""
        return self.sliding_window is None or self.is_sliding

    def options(self):
        return {"sliding_window": self.sliding_window if self.is_sliding else None}


class PrunedExaone4DecoderLayer(PrunedBlock, stock.Exaone4DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedExaone4Attention
    attention_norms = (None, "post_attention_layernorm")
    mlp_norms = (None, "post_feedforward_layernorm")


class PrunedExaone4ForCausalLM(PrunedModel, stock.Exaone4ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedExaone4Config
    block_class = PrunedExaone4DecoderLayer
    _no_split_modules = ["PrunedExaone4DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedExaone4Config.register_for_auto_class()
PrunedExaone4ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
