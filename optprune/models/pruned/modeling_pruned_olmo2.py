"""OLMo 2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.olmo2 import modeling_olmo2 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedOlmo2Config(stock.Olmo2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_olmo2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedOlmo2Attention(PrunedAttention, stock.Olmo2Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "row"


class PrunedOlmo2DecoderLayer(PrunedBlock, stock.Olmo2DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedOlmo2Attention
    attention_norms = (None, "post_attention_layernorm")
    mlp_norms = (None, "post_feedforward_layernorm")


class PrunedOlmo2ForCausalLM(PrunedModel, stock.Olmo2ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedOlmo2Config
    block_class = PrunedOlmo2DecoderLayer
    _no_split_modules = ["PrunedOlmo2DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedOlmo2Config.register_for_auto_class()
PrunedOlmo2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
