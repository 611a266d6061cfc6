"""Gemma 4 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from torch import nn
from transformers.models.gemma4 import modeling_gemma4 as stock

from .pruned_cache import remembered  # noqa: F401  # the files that this one names are copied with it
from .pruned_decoder import PrunedBlock, PrunedModel  # noqa: F401
from .pruned_mixture import PrunedMixtureBlock


class PrunedGemma4Config(stock.Gemma4TextConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_gemma4_text"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGemma4TextAttention(stock.Gemma4TextAttention):
    """Attention with all its heads, as in the stock class."""


class PrunedGemma4TextDecoderLayer(PrunedMixtureBlock, stock.Gemma4TextDecoderLayer):
    """Decoder block of any width, or any number of experts beside an MLP, with or without its sub-blocks."""

    attention_class = PrunedGemma4TextAttention
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = (None, "post_feedforward_layernorm")
    routed = property(lambda self: self)
    router_name = "router"
    mixture_parts = ("router", "experts", "pre_feedforward_layernorm_2")
    mixture_norms = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2")

    def answered(self, states):
        dense = self.mlp(self.pre_feedforward_layernorm(states))
        if not self.enable_moe_block:
            return dense
        flat = states.reshape(-1, states.shape[-1])
        _, weights, chosen = self.router(flat)
        routed = self.experts(self.pre_feedforward_layernorm_2(flat), chosen, weights).reshape(states.shape)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)

    def scoring(self, router):
        return router.proj

    def shrink(self, shape, group):
        super().shrink(shape, group)
        if shape["mlp_width"] and shape.get("experts"):
            factors = self.router.per_expert_scale
            self.router.per_expert_scale = nn.Parameter(factors.new_empty(shape["experts"]))

    def remove(self, *names):
        if "mlp" in names:
            beside = (*self.mixture_parts, *self.mixture_norms) if self.enable_moe_block else ()
            names = (*names, "pre_feedforward_layernorm", *beside)
        super().remove(*names)

    def forward(self, hidden_states, per_layer_input=None, **kwargs):
        states = super().forward(hidden_states, **kwargs)
        if self.hidden_size_per_layer_input:
            mixed = self.act_fn(self.per_layer_input_gate(states)) * per_layer_input
            states = states + self.post_per_layer_input_norm(self.per_layer_projection(mixed))
        return states * self.layer_scalar

    def shrink_mixer(self, shape, group):
        if shape["kv_heads"]:
            self.self_attn.__class__ = self.attention_class
        else:
            self.remove("self_attn", *self.attention_norms)


class PrunedSharingModel(PrunedModel):
    """A model of such blocks, whose caches hold the keys and values that several blocks read."""

    block_class = PrunedGemma4TextDecoderLayer
    _no_split_modules = ["PrunedGemma4TextDecoderLayer"]

    def number_caches(self):
        """Number the caches, each kind's from its first one, of which transformers reads the length."""
        config = self.config.get_text_config()
        free = {kind: [] for kind in config.layer_types}
        for index, (kind, mode) in enumerate(zip(config.layer_types, config.kv_sharing_modes, strict=True)):
            if mode != "reuse":
                free[kind].append(index)
        for block in self.get_submodule(self.blocks):
            if block.mixer is not None and not block.mixer.is_kv_shared_layer:
                block.mixer.layer_idx = free[block.mixer.layer_type].pop(0)


class PrunedGemma4ForCausalLM(PrunedSharingModel, stock.Gemma4ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGemma4Config


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGemma4Config.register_for_auto_class()
PrunedGemma4ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
