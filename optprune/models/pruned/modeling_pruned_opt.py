"""OPT with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer, eager_attention_forward

from .pruned_cache import remembered
from .pruned_decoder import ATTENTION, resized


class PrunedOPTConfig(OPTConfig):
    """An OPT config with a shape for each block."""

    model_type = "pruned_opt"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedOPTAttention(OPTAttention):
    """Attention whose numbers of heads and value dimensions are those of its weights and its cache."""

    def forward(
        self,
        hidden_states,
        cache=None,
        attention_mask=None,
        past_key_values=None,  # the name of the cache in older versions of transformers
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        query = (self.q_proj(hidden_states) * self.scaling).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, key.shape[1], -1).transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = remembered(cache, self.layer_idx, key, value, kwargs.get("cache_position"))
        attend = ATTENTION(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=1.0, **kwargs)
        return self.out_proj(mixed.reshape(*shape, -1)), weights


class PrunedOPTDecoderLayer(OPTDecoderLayer):
    """A decoder block in which the attention or the MLP may be missing, with its norm."""

    def forward(self, hidden_states, use_cache=None, **kwargs):
        weights = None
        if self.self_attn is not None:
            normed = self.self_attn_layer_norm(hidden_states) if self.do_layer_norm_before else hidden_states
            mixed, weights = self.self_attn(hidden_states=normed, **kwargs)
            hidden_states = hidden_states + nn.functional.dropout(mixed, p=self.dropout, training=self.training)
            if not self.do_layer_norm_before:
                hidden_states = self.self_attn_layer_norm(hidden_states)
        if self.fc1 is not None:
            normed = self.final_layer_norm(hidden_states) if self.do_layer_norm_before else hidden_states
            mixed = self.fc2(self.activation_fn(self.fc1(normed)))
            hidden_states = hidden_states + nn.functional.dropout(mixed, p=self.dropout, training=self.training)
            if not self.do_layer_norm_before:
                hidden_states = self.final_layer_norm(hidden_states)
        # transformers 4.57 passes a head mask, and takes the first of a tuple.
        return (hidden_states, weights) if "layer_head_mask" in kwargs else hidden_states


class PrunedOPTForCausalLM(OPTForCausalLM):
    """A model that is built as the stock class builds it, then narrowed block by block."""

    config_class = PrunedOPTConfig
    _no_split_modules = ["PrunedOPTDecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        for block, shape in zip(self.model.decoder.layers, config.optprune_shapes, strict=True):
            block.__class__ = PrunedOPTDecoderLayer
            attention, heads = block.self_attn, shape["kv_heads"]
            if heads:
                attention.__class__ = PrunedOPTAttention
                attention.q_proj = resized(attention.q_proj, outputs=heads * attention.head_dim)
                attention.k_proj = resized(attention.k_proj, outputs=heads * attention.head_dim)
                attention.v_proj = resized(attention.v_proj, outputs=heads * shape["value_dim"])
                attention.out_proj = resized(attention.out_proj, inputs=heads * shape["value_dim"])
            else:
                block.self_attn = block.self_attn_layer_norm = None
            if shape["mlp_width"]:
                block.fc1 = resized(block.fc1, outputs=shape["mlp_width"])
                block.fc2 = resized(block.fc2, inputs=shape["mlp_width"])
            else:
                block.fc1 = block.fc2 = block.final_layer_norm = None
        self.number_caches()

    def number_caches(self):
        """Number the caches of the blocks with attention from the first one, where transformers reads the length."""
        for index, block in enumerate(block for block in self.model.decoder.layers if block.self_attn is not None):
            block.self_attn.layer_idx = index


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedOPTConfig.register_for_auto_class()
PrunedOPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
