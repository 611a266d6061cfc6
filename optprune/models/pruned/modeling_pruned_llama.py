"""Llama with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.llama import modeling_llama as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedLlamaConfig(stock.LlamaConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_llama"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedLlamaAttention(PrunedAttention, stock.LlamaAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True


class PrunedLlamaDecoderLayer(PrunedBlock, stock.LlamaDecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedLlamaAttention


class PrunedLlamaForCausalLM(PrunedModel, stock.LlamaForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedLlamaConfig
    block_class = PrunedLlamaDecoderLayer
    _no_split_modules = ["PrunedLlamaDecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedLlamaConfig.register_for_auto_class()
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
