"""Text-only Qwen3.5 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3_5 import modeling_qwen3_5 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_recurrent import PrunedGatedAttention, PrunedHybridBlock


class PrunedQwen3_5Config(stock.Qwen3_5TextConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen3_5_text"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen3_5Attention(PrunedGatedAttention, stock.Qwen3_5Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock


class PrunedQwen3_5DecoderLayer(PrunedHybridBlock, stock.Qwen3_5DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedQwen3_5Attention


class PrunedQwen3_5ForCausalLM(PrunedModel, stock.Qwen3_5ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen3_5Config
    block_class = PrunedQwen3_5DecoderLayer
    _no_split_modules = ["PrunedQwen3_5DecoderLayer"]


# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedQwen3_5Config.register_for_auto_class()
PrunedQwen3_5ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
