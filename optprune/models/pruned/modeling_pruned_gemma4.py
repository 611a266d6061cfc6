"""Gemma 4 whose language part has decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.gemma4 import modeling_gemma4 as stock

from .modeling_pruned_gemma4_text import PrunedSharingModel
from .pruned_cache import remembered  # noqa: F401  # the files that this one names are copied with it
from .pruned_decoder import PrunedBlock, PrunedModel  # noqa: F401
from .pruned_mixture import PrunedMixtureBlock  # noqa: F401


class PrunedGemma4VisionConfig(stock.Gemma4Config):
    """The stock config, with a shape for each block in its text_config."""

    model_type = "pruned_gemma4"


class PrunedGemma4ForConditionalGeneration(PrunedSharingModel, stock.Gemma4ForConditionalGeneration):
    """Vision-language model whose decoder blocks may differ in shape."""

    config_class = PrunedGemma4VisionConfig
    blocks = "model.language_model.layers"


# The tensors in the folder have the names of the class.
PrunedGemma4VisionConfig.register_for_auto_class()
PrunedGemma4ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
