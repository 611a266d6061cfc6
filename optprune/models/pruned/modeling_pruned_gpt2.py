"""GPT-2 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

import torch
from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from .pruned_cache import remembered
from .pruned_decoder import ATTENTION, PrunedBlock, PrunedModel


class PrunedGPT2Config(stock.GPT2Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_gpt2"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGPT2Attention(stock.GPT2Attention):
    """Attention whose numbers of heads and value dimensions are those of its weights and its cache."""

    def forward(self, hidden_states, cache=None, attention_mask=None, past_key_values=None, **kwargs):
        shape, size = hidden_states.shape[:-1], self.head_dim
        rows, values = self.c_attn(hidden_states), self.c_proj.weight.numel() // self.embed_dim
        keys = (rows.shape[-1] - values) // 2
        query, key, value = rows.split((keys, keys, values), dim=-1)
        query, key = (states.view(*shape, -1, size).transpose(1, 2) for states in (query, key))
        value = value.view(*shape, keys // size, -1).transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = remembered(cache, self.layer_idx, key, value, kwargs.get("cache_position"))
        attend = ATTENTION(self.config._attn_implementation, eager)
        dropout = self.attn_dropout.p if self.training else 0.0
        options = {"scaling": size**-0.5 if self.scale_attn_weights else 1.0, "dropout": dropout}
        mixed, weights = attend(self, query, key, value, attention_mask, **options, **kwargs)
        return self.resid_dropout(self.c_proj(mixed.reshape(*shape, -1))), weights


def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Return attention as transformers 5 computes it, because 4.57 scales by the value dimensions."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = scores if attention_mask is None else scores + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1).type(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class PrunedGPT2Block(PrunedBlock, stock.GPT2Block):
    """A decoder block in which the attention or the MLP may be missing, with its norm."""

    attention_class = PrunedGPT2Attention

    @property
    def self_attn(self):
        """The attention, as others call it."""
        return self.attn

    def forward(self, hidden_states, cache=None, attention_mask=None, encoder_hidden_states=None, *older, **kwargs):
        weights, wanted = None, kwargs.pop("output_attentions", None)
        kwargs.pop("encoder_attention_mask", None)
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if older:  # transformers 4.57 passes the cache positions before the mask, and a head mask after it
            kwargs["cache_position"], attention_mask = attention_mask, encoder_hidden_states
        if self.attn is not None:
            mixed, weights = self.attn(self.ln_1(hidden_states), cache=cache, attention_mask=attention_mask, **kwargs)
            hidden_states = mixed + hidden_states
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        # transformers 4.57 passes whether weights are needed, and takes the first of a tuple.
        return hidden_states if wanted is None else (hidden_states, weights)

    def shrink(self, shape, group):
        hidden, heads, attention = self.ln_1.weight.shape[0], shape["kv_heads"], self.attn
        if heads:
            attention.__class__ = self.attention_class
            values = heads * shape["value_dim"]
            attention.c_attn = Conv1D(2 * heads * attention.head_dim + values, hidden)
            attention.c_proj = Conv1D(hidden, values)
        else:
            self.attn = self.ln_1 = None
        if shape["mlp_width"]:
            self.mlp.c_fc = Conv1D(shape["mlp_width"], hidden)
            self.mlp.c_proj = Conv1D(hidden, shape["mlp_width"])
        else:
            self.mlp = self.ln_2 = None


class PrunedGPT2LMHeadModel(PrunedModel, stock.GPT2LMHeadModel):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGPT2Config
    block_class = PrunedGPT2Block
    blocks = "transformer.h"
    _no_split_modules = ["PrunedGPT2Block"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGPT2Config.register_for_auto_class()
PrunedGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
