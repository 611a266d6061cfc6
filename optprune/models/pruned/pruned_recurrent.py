"""Decoder blocks with attention or a recurrent mixer, pruned by optprune; needs torch and transformers only."""

import copy

import torch

from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedGatedAttention(PrunedAttention):
    """Attention whose query layer also makes a factor for each value dimension, behind the queries of each head."""

    norms = "head"

    def projected(self, hidden_states):
        rows, mixed = self.q_proj(hidden_states), self.o_proj.in_features
        heads = (rows.shape[-1] - mixed) // self.head_dim
        query, gate = rows.unflatten(-1, (heads, -1)).split((self.head_dim, mixed // heads), dim=-1)
        return query, self.k_proj(hidden_states), self.v_proj(hidden_states), torch.sigmoid(gate.flatten(-2))

    def shrink(self, queries, keys, values, mixed):
        super().shrink(queries + mixed, keys, values, mixed)


class PrunedHybridBlock(PrunedBlock):
    """A decoder block with attention, with a recurrent mixer of any number of heads, or without either."""

    recurrent = "linear_attn"
    """the recurrent mixer"""
    counted = ("linear_num_key_heads", "linear_num_value_heads")
    """the config fields that are smaller with fewer heads; the first one holds the number in a shape"""
    not_recurrent = ("position_embeddings", "position_ids", "use_cache")
    """the arguments of a block that a recurrent mixer does not take"""
    mlp_module = "mlp"
    """the MLP"""
    mlp = property(lambda self: self._modules.get(self.mlp_module))

    @property
    def mixer(self):
        found = (self._modules.get(name) for name in ("self_attn", self.recurrent))
        return next((module for module in found if module is not None), None)

    def mixed(self, states, **kwargs):
        if self._modules.get(self.recurrent) is None:
            return super().mixed(states, **kwargs)
        return self.mixer(states, **self.taken(kwargs))

    def taken(self, kwargs):
        """Return the arguments of a block that a recurrent mixer takes."""
        return {name: value for name, value in kwargs.items() if name not in self.not_recurrent}

    def remove(self, *names):
        super().remove(*(self.mlp_module if name == "mlp" else name for name in names))

    def shrink_mixer(self, shape, group):
        if self.recurrent not in self._modules:
            super().shrink_mixer(shape, group)
        elif shape.get("recurrent"):
            setattr(self, self.recurrent, with_fewer_heads(self.mixer, self.config, self.counted, shape["recurrent"]))
        else:
            self.remove(self.recurrent, *self.attention_norms)


class PrunedParallelBlock(PrunedHybridBlock):
    """A decoder block with attention and a recurrent mixer behind one norm, or without one of them, or both."""

    def forward(self, hidden_states, **kwargs):
        return (super().forward(hidden_states, **kwargs),)

    def mixed(self, states, **kwargs):
        modules = ((self.recurrent, self.mixed_by_state), ("self_attn", self.mixed_by_attention))
        found = [mix(states, **kwargs) for name, mix in modules if self._modules.get(name) is not None]
        return sum(found[1:], found[0])

    def shrink_mixer(self, shape, group):
        if shape["kv_heads"]:
            PrunedBlock.shrink_mixer(self, shape, group)
        else:
            self.remove("self_attn")
        if not shape.get("recurrent"):
            self.remove(self.recurrent)
        if self.mixer is None:
            self.remove(*self.attention_norms)


class PrunedParallelModel(PrunedModel):
    """A model of such blocks, whose caches hold what both mixers of a block need."""

    def number_caches(self):
        for name in ("self_attn", self.block_class.recurrent):
            found = [block._modules.get(name) for block in self.get_submodule(self.blocks)]
            for index, mixer in enumerate(mixer for mixer in found if mixer is not None):
                mixer.layer_idx = index


def with_fewer_heads(mixer, config, counted, heads):
    """Return a recurrent mixer like another one, of a config's sizes, of so many heads."""
    if not counted or heads == getattr(config, counted[0]):
        return mixer
    smaller = copy.copy(config)
    for name in counted:
        setattr(smaller, name, getattr(config, name) * heads // getattr(config, counted[0]))
    other = type(mixer)(smaller, 0)  # the number of a block that may be the only one of the config
    other.layer_idx, other.layer_type = mixer.layer_idx, mixer.layer_type
    return other
