"""GLM 4.5 with experts and with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.glm4_moe import modeling_glm4_moe as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock, name_experts


class PrunedGlm4MoeConfig(stock.Glm4MoeConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_glm4_moe"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGlm4MoeAttention(PrunedAttention, stock.Glm4MoeAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock

    @property
    def norms(self):
        """The extent of the norm of queries and keys, if there is one."""
        return "head" if self.use_qk_norm else None


class PrunedGlm4MoeDecoderLayer(PrunedMixtureBlock, stock.Glm4MoeDecoderLayer):
    """Decoder block with any number of experts or one MLP, with or without its sub-blocks."""

    attention_class = PrunedGlm4MoeAttention


class PrunedGlm4MoeForCausalLM(PrunedModel, stock.Glm4MoeForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGlm4MoeConfig
    block_class = PrunedGlm4MoeDecoderLayer
    _no_split_modules = ["PrunedGlm4MoeDecoderLayer"]


name_experts(PrunedGlm4MoeConfig.model_type)
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedGlm4MoeConfig.register_for_auto_class()
PrunedGlm4MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
