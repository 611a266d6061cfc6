"""Decoder blocks with attention or a recurrent mixer, pruned by optprune; needs torch and transformers only."""

import torch

from .pruned_decoder import PrunedAttention, PrunedBlock


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
    """A decoder block with attention, with a recurrent mixer as the stock class has it, or without either."""

    recurrent = "linear_attn"
    """the recurrent mixer"""
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
        own = {name: value for name, value in kwargs.items() if name not in self.not_recurrent}
        return self.mixer(states, **own)

    def remove(self, *names):
        super().remove(*(self.mlp_module if name == "mlp" else name for name in names))

    def shrink_mixer(self, shape, group):
        if self.recurrent not in self._modules:
            super().shrink_mixer(shape, group)
        elif not shape.get("recurrent"):
            self.remove(self.recurrent, *self.attention_norms)
