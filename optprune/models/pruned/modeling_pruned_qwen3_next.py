"""Qwen3-Next with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3_next import modeling_qwen3_next as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts
from .pruned_recurrent import PrunedGatedAttention, PrunedHybridBlock


class PrunedQwen3NextConfig(stock.Qwen3NextConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen3_next"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen3NextAttention(PrunedGatedAttention, stock.Qwen3NextAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock


class PrunedQwen3NextDecoderLayer(PrunedMixtureBlock, PrunedHybridBlock, stock.Qwen3NextDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedQwen3NextAttention


class PrunedQwen3NextForCausalLM(PrunedModel, stock.Qwen3NextForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen3NextConfig
    block_class = PrunedQwen3NextDecoderLayer
    _no_split_modules = ["PrunedQwen3NextDecoderLayer"]


name_experts(PrunedQwen3NextConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedQwen3NextConfig.register_for_auto_class()
PrunedQwen3NextForCausalLM.register_for_auto_class("AutoModelForCausalLM")
