"""Qwen3 with experts and with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3_moe import modeling_qwen3_moe as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedQwen3MoeConfig(stock.Qwen3MoeConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen3_moe"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen3MoeAttention(PrunedAttention, stock.Qwen3MoeAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"

    def options(self):
        return {"sliding_window": self.sliding_window}


class PrunedQwen3MoeDecoderLayer(PrunedMixtureBlock, stock.Qwen3MoeDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedQwen3MoeAttention


class PrunedQwen3MoeForCausalLM(PrunedModel, stock.Qwen3MoeForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen3MoeConfig
    block_class = PrunedQwen3MoeDecoderLayer
    _no_split_modules = ["PrunedQwen3MoeDecoderLayer"]


name_experts(PrunedQwen3MoeConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedQwen3MoeConfig.register_for_auto_class()
PrunedQwen3MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
