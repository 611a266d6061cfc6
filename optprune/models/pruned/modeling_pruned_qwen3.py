"""Qwen3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3 import modeling_qwen3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedQwen3Config(stock.Qwen3Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen3"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen3Attention(PrunedAttention, stock.Qwen3Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"

    def options(self):
        return {"sliding_window": self.sliding_window}


class PrunedQwen3DecoderLayer(PrunedBlock, stock.Qwen3DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedQwen3Attention


class PrunedQwen3ForCausalLM(PrunedModel, stock.Qwen3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen3Config
    block_class = PrunedQwen3DecoderLayer
    _no_split_modules = ["PrunedQwen3DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedQwen3Config.register_for_auto_class()
PrunedQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
