"""GLM 4.7 Flash with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedModel
from .pruned_latent import PrunedLatentAttention
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedGlm4MoeLiteConfig(stock.Glm4MoeLiteConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_glm4_moe_lite"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGlm4MoeLiteAttention(PrunedLatentAttention, stock.Glm4MoeLiteAttention):
    """Latent attention with any number of heads and value dimensions."""


class PrunedGlm4MoeLiteDecoderLayer(PrunedMixtureBlock, stock.Glm4MoeLiteDecoderLayer):
    """Decoder block with any number of experts or one MLP, with or without its sub-blocks."""

    attention_class = PrunedGlm4MoeLiteAttention


class PrunedGlm4MoeLiteForCausalLM(PrunedModel, stock.Glm4MoeLiteForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGlm4MoeLiteConfig
    block_class = PrunedGlm4MoeLiteDecoderLayer
    _no_split_modules = ["PrunedGlm4MoeLiteDecoderLayer"]


name_experts(PrunedGlm4MoeLiteConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedGlm4MoeLiteConfig.register_for_auto_class()
PrunedGlm4MoeLiteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
