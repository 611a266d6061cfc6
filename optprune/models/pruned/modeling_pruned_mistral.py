"""Mistral with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.mistral import modeling_mistral as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedMistralConfig(stock.MistralConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_mistral"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedMistralAttention(PrunedAttention, stock.MistralAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def options(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class PrunedMistralDecoderLayer(PrunedBlock, stock.MistralDecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedMistralAttention


class PrunedMistralForCausalLM(PrunedModel, stock.MistralForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedMistralConfig
    block_class = PrunedMistralDecoderLayer
    _no_split_modules = ["PrunedMistralDecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedMistralConfig.register_for_auto_class()
PrunedMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
