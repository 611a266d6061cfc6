"""Qwen2 with experts and with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen2_moe import modeling_qwen2_moe as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedQwen2MoeConfig(stock.Qwen2MoeConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen2_moe"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen2MoeAttention(PrunedAttention, stock.Qwen2MoeAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True


class PrunedQwen2MoeDecoderLayer(PrunedMixtureBlock, stock.Qwen2MoeDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedQwen2MoeAttention


class PrunedQwen2MoeForCausalLM(PrunedModel, stock.Qwen2MoeForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen2MoeConfig
    block_class = PrunedQwen2MoeDecoderLayer
    _no_split_modules = ["PrunedQwen2MoeDecoderLayer"]


name_experts(PrunedQwen2MoeConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedQwen2MoeConfig.register_for_auto_class()
PrunedQwen2MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
