"""Mistral 3 whose language part has decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.mistral3 import modeling_mistral3 as stock

from .modeling_pruned_ministral3 import PrunedMinistral3DecoderLayer
from .modeling_pruned_mistral import PrunedMistralDecoderLayer
from .pruned_cache import remembered  # noqa: F401  # the files that this one names are copied with it
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel  # noqa: F401

BLOCKS = {"ministral3": PrunedMinistral3DecoderLayer, "mistral": PrunedMistralDecoderLayer}
"""the class of blocks by the family of the language part"""


class PrunedMistral3Config(stock.Mistral3Config):
    """The stock config, with a shape for each block in its text_config."""

    model_type = "pruned_mistral3"


class PrunedMistral3ForConditionalGeneration(PrunedModel, stock.Mistral3ForConditionalGeneration):
    """Vision-language model whose decoder blocks may differ in shape."""

    config_class = PrunedMistral3Config
    blocks = "model.language_model.layers"
    _no_split_modules = ["PrunedMistralDecoderLayer", "PrunedMinistral3DecoderLayer"]

    @property
    def block_class(self):
        """The class of its blocks."""
        return BLOCKS[self.config.text_config.model_type]


# The tensors in the folder have the names that the stock class reads.
NAMES = get_checkpoint_conversion_mapping("mistral3")
register_checkpoint_conversion_mapping(PrunedMistral3ForConditionalGeneration.__name__, NAMES, overwrite=True)
PrunedMistral3Config.register_for_auto_class()
PrunedMistral3ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
