"""Mixtral with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.mixtral import modeling_mixtral as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedMixtralConfig(stock.MixtralConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_mixtral"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedMixtralAttention(PrunedAttention, stock.MixtralAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def options(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class PrunedMixtralDecoderLayer(PrunedMixtureBlock, stock.MixtralDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedMixtralAttention


class PrunedMixtralForCausalLM(PrunedModel, stock.MixtralForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedMixtralConfig
    block_class = PrunedMixtralDecoderLayer
    _no_split_modules = ["PrunedMixtralDecoderLayer"]


name_experts(PrunedMixtralConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedMixtralConfig.register_for_auto_class()
PrunedMixtralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
