"""DeepSeek V3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_latent import PrunedLatentAttention
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedDeepseekV3Config(stock.DeepseekV3Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_deepseek_v3"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedDeepseekV3Attention(PrunedLatentAttention, stock.DeepseekV3Attention):
    """Latent attention with any number of heads and value dimensions."""


class PrunedDeepseekV3DecoderLayer(PrunedMixtureBlock, stock.DeepseekV3DecoderLayer):
    """Decoder block with any number of experts or one MLP, with or without its sub-blocks."""

    attention_class = PrunedDeepseekV3Attention


class PrunedDeepseekV3ForCausalLM(PrunedModel, stock.DeepseekV3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedDeepseekV3Config
    block_class = PrunedDeepseekV3DecoderLayer
    _no_split_modules = ["PrunedDeepseekV3DecoderLayer"]


name_experts(PrunedDeepseekV3Config.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedDeepseekV3Config.register_for_auto_class()
PrunedDeepseekV3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
