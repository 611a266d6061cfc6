"""Text-only Qwen3.5 with experts and decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts
from .pruned_recurrent import PrunedGatedAttention, PrunedHybridBlock


class PrunedQwen3_5MoeConfig(stock.Qwen3_5MoeTextConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_qwen3_5_moe_text"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedQwen3_5MoeAttention(PrunedGatedAttention, stock.Qwen3_5MoeAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock


class PrunedQwen3_5MoeDecoderLayer(PrunedMixtureBlock, PrunedHybridBlock, stock.Qwen3_5MoeDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedQwen3_5MoeAttention


class PrunedQwen3_5MoeForCausalLM(PrunedModel, stock.Qwen3_5MoeForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedQwen3_5MoeConfig
    block_class = PrunedQwen3_5MoeDecoderLayer
    _no_split_modules = ["PrunedQwen3_5MoeDecoderLayer"]


name_experts(PrunedQwen3_5MoeConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedQwen3_5MoeConfig.register_for_auto_class()
PrunedQwen3_5MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
