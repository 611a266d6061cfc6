"""Gemma 3 whose language part has decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.gemma3 import modeling_gemma3 as stock

from .modeling_pruned_gemma3_text import PrunedGemma3DecoderLayer
from .pruned_cache import remembered  # noqa: F401  # the files that this one names are copied with it
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel  # noqa: F401


class PrunedGemma3VisionConfig(stock.Gemma3Config):
    """The stock config, with a shape for each block in its text_config."""

    model_type = "pruned_gemma3"


class PrunedGemma3ForConditionalGeneration(PrunedModel, stock.Gemma3ForConditionalGeneration):
    """Vision-language model whose decoder blocks may differ in shape."""

    config_class = PrunedGemma3VisionConfig
    block_class = PrunedGemma3DecoderLayer
    blocks = "model.language_model.layers"
    _no_split_modules = ["PrunedGemma3DecoderLayer"]


# The tensors in the folder have the names that the stock class reads.
NAMES = get_checkpoint_conversion_mapping("gemma3")
register_checkpoint_conversion_mapping(PrunedGemma3ForConditionalGeneration.__name__, NAMES, overwrite=True)
PrunedGemma3VisionConfig.register_for_auto_class()
PrunedGemma3ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
