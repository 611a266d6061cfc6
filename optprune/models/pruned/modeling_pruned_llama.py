"""Llama with decoder blocks of different shapes, pruned by optprune; needs torch and transformers, nothing else.

`config.optprune_shapes` says what each block holds: {"mlp_width": 1024, "kv_heads": 2, "value_dim": 48}. A block with
kv_heads 0 has no attention, one with mlp_width 0 no MLP. The config's other fields are those of the stock class.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

ATTENTION = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", ALL_ATTENTION_FUNCTIONS.get)  # transformers 5, or 4.57


class PrunedLlamaConfig(LlamaConfig):
    """A Llama config with a shape for each block."""

    model_type = "pruned_llama"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedLlamaAttention(LlamaAttention):
    """Reads the numbers of heads and of value dimensions off the weights; the cache is as small as they are."""

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,  # what older versions of transformers call the cache
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, key.shape[1], -1).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ATTENTION(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*shape, -1)), weights


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder block in which the attention or the MLP may be missing, with the norm before it."""

    def forward(self, hidden_states, **kwargs):
        if self.self_attn is not None:
            mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + mixed
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """Built as the stock class builds it, then narrowed block by block."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        group = config.num_attention_heads // config.num_key_value_heads
        for block, shape in zip(self.model.layers, config.optprune_shapes, strict=True):
            block.__class__ = PrunedLlamaDecoderLayer
            attention, mlp, kv_heads = block.self_attn, block.mlp, shape["kv_heads"]
            if kv_heads:
                attention.__class__ = PrunedLlamaAttention
                attention.q_proj = resized(attention.q_proj, outputs=kv_heads * group * attention.head_dim)
                attention.k_proj = resized(attention.k_proj, outputs=kv_heads * attention.head_dim)
                attention.v_proj = resized(attention.v_proj, outputs=kv_heads * shape["value_dim"])
                attention.o_proj = resized(attention.o_proj, inputs=kv_heads * group * shape["value_dim"])
            else:
                block.self_attn = block.input_layernorm = None
            if shape["mlp_width"]:
                mlp.gate_proj = resized(mlp.gate_proj, outputs=shape["mlp_width"])
                mlp.up_proj = resized(mlp.up_proj, outputs=shape["mlp_width"])
                mlp.down_proj = resized(mlp.down_proj, inputs=shape["mlp_width"])
            else:
                block.mlp = block.post_attention_layernorm = None
        self.number_caches()

    def number_caches(self):
        """Give caches to the blocks with attention, from the first on: transformers reads the length off the first."""
        for index, block in enumerate(block for block in self.model.layers if block.self_attn is not None):
            block.self_attn.layer_idx = index


def resized(layer, inputs=None, outputs=None):
    """A fresh linear layer like another one, with another number of inputs or outputs."""
    return nn.Linear(
        layer.in_features if inputs is None else inputs,
        layer.out_features if outputs is None else outputs,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )


# Saving such a model copies this file into the folder and names it in the config.
PrunedLlamaConfig.register_for_auto_class()
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
