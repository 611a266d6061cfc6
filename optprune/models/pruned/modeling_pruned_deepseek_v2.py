"""DeepSeek V2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_latent import PrunedLatentAttention
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedDeepseekV2Config(stock.DeepseekV2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_deepseek_v2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedDeepseekV2Attention(PrunedLatentAttention, stock.DeepseekV2Attention):
    """Latent attention with any number of heads and value dimensions."""


class PrunedDeepseekV2DecoderLayer(PrunedMixtureBlock, stock.DeepseekV2DecoderLayer):
    """Decoder block with any number of experts or one MLP, with or without its sub-blocks."""

    attention_class = PrunedDeepseekV2Attention


class PrunedDeepseekV2ForCausalLM(PrunedModel, stock.DeepseekV2ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedDeepseekV2Config
    block_class = PrunedDeepseekV2DecoderLayer
    _no_split_modules = ["PrunedDeepseekV2DecoderLayer"]


name_experts(PrunedDeepseekV2Config.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedDeepseekV2Config.register_for_auto_class()
PrunedDeepseekV2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
