"""Llava whose language part has decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava import modeling_llava as stock

from .modeling_pruned_llama import PrunedLlamaDecoderLayer
from .modeling_pruned_mistral import PrunedMistralDecoderLayer
from .modeling_pruned_qwen2 import PrunedQwen2DecoderLayer
from .pruned_cache import remembered  # noqa: F401  # the files that this one names are copied with it
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel  # noqa: F401

BLOCKS = {"llama": PrunedLlamaDecoderLayer, "mistral": PrunedMistralDecoderLayer, "qwen2": PrunedQwen2DecoderLayer}
"""the class of blocks by the family of the language part"""


class PrunedLlavaConfig(stock.LlavaConfig):
    """The stock config, with a shape for each block in its text_config."""

    model_type = "pruned_llava"


class PrunedLlavaForConditionalGeneration(PrunedModel, stock.LlavaForConditionalGeneration):
    """Vision-language model whose decoder blocks may differ in shape."""

    config_class = PrunedLlavaConfig
    blocks = "model.language_model.layers"
    _no_split_modules = ["PrunedLlamaDecoderLayer", "PrunedMistralDecoderLayer", "PrunedQwen2DecoderLayer"]

    @property
    def block_class(self):
        """The class of its blocks."""
        return BLOCKS[self.config.text_config.model_type]


# The tensors in the folder have the names that the stock class reads.
NAMES = get_checkpoint_conversion_mapping("llava")
register_checkpoint_conversion_mapping(PrunedLlavaForConditionalGeneration.__name__, NAMES, overwrite=True)
PrunedLlavaConfig.register_for_auto_class()
PrunedLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
