"""SmolLM3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.smollm3 import modeling_smollm3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedSmolLM3Config(stock.SmolLM3Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_smollm3"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedSmolLM3Attention(PrunedAttention, stock.SmolLM3Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def options(self):
        return {"sliding_window": self.sliding_window}


class PrunedSmolLM3DecoderLayer(PrunedBlock, stock.SmolLM3DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedSmolLM3Attention


class PrunedSmolLM3ForCausalLM(PrunedModel, stock.SmolLM3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedSmolLM3Config
    block_class = PrunedSmolLM3DecoderLayer
    _no_split_modules = ["PrunedSmolLM3DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedSmolLM3Config.register_for_auto_class()
PrunedSmolLM3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
