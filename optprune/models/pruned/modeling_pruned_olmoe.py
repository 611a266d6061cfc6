"""OLMoE with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.olmoe import modeling_olmoe as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedOlmoeConfig(stock.OlmoeConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_olmoe"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedOlmoeAttention(PrunedAttention, stock.OlmoeAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "row"

    def options(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class PrunedOlmoeDecoderLayer(PrunedMixtureBlock, stock.OlmoeDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedOlmoeAttention


class PrunedOlmoeForCausalLM(PrunedModel, stock.OlmoeForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedOlmoeConfig
    block_class = PrunedOlmoeDecoderLayer
    _no_split_modules = ["PrunedOlmoeDecoderLayer"]


name_experts(PrunedOlmoeConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedOlmoeConfig.register_for_auto_class()
PrunedOlmoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
