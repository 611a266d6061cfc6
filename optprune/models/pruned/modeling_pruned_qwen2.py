"""Qwen2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen2 import modeling_qwen2 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedQwen2Config(stock.Qwen2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen2Attention(PrunedAttention, stock.Qwen2Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def options(self):
        return {"sliding_window": self.sliding_window}


class PrunedQwen2DecoderLayer(PrunedBlock, stock.Qwen2DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedQwen2Attention


class PrunedQwen2ForCausalLM(PrunedModel, stock.Qwen2ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen2Config
    block_class = PrunedQwen2DecoderLayer
    _no_split_modules = ["PrunedQwen2DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedQwen2Config.register_for_auto_class()
PrunedQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
