"""Decoder blocks of different shapes, pruned by optprune, for all families; needs torch and transformers only.

`optprune_shapes` of the config, or of its text_config, lists each block's shape: {"mlp_width": 1024, "kv_heads": 2,
"value_dim": 48}. A block with kv_heads 0 has no attention, one with mlp_width 0 no MLP; one with experts also has their
number, one with a recurrent mixer that of its key heads or groups, and one whose heads of queries and keys lack some
rotary pairs that of those they keep, which the tensor kept_pairs lists for each KV head. Other fields are those of the
stock config.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .pruned_cache import remembered

ATTENTION = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", ALL_ATTENTION_FUNCTIONS.get)  # transformers 5, or 4.57


class PrunedAttention:
    """Attention whose numbers of heads and value dimensions are those of its weights and its cache."""

    stock = None
    """the module of the stock classes, with the functions for rotation and attention"""
    norms = None
    """the extent of a norm of queries and keys, if there is one: "head", or "row" for all heads together"""
    use_rope = True
    """whether queries and keys are rotated"""
    by_pairs = False
    """whether the heads of queries and keys may lack rotary pairs, each KV head other ones"""

    def options(self):
        """Return further arguments of the family's attention function."""
        return {}

    def projected(self, hidden_states):
        """Return the queries, keys and values of all heads, and factors of what is mixed, if any."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def positioned(self, query, key, position_embeddings, position_ids):
        """Return the queries and keys with the positions of their tokens."""
        rotated, pairs = self.stock.apply_rotary_pos_emb, self.pairs
        if not self.use_rope:
            return query, key
        if pairs is None:
            return rotated(query, key, *position_embeddings)
        # The first dimensions of all pairs come before the second ones; [batch, tokens, dim] to [batch, kv, tokens, n].
        dims = torch.cat([pairs, pairs + self.head_dim // 2], dim=1)
        cos, sin = (table[..., dims].transpose(1, 2) for table in position_embeddings)
        # The query heads of a KV head come first, so that its tables serve them all.
        query, key = query.unflatten(1, (len(pairs), -1)).transpose(1, 2), key[:, None]
        query, key = rotated(query, key, cos, sin)
        return query.transpose(1, 2).flatten(1, 2), key[:, 0]

    @property
    def pairs(self):
        """The rotary pairs [kv_heads, n] that the heads keep; None where they keep all."""
        return getattr(self, "kept_pairs", None)

    def shrink(self, queries, keys, values, mixed):
        """Replace the layers by layers of these numbers of outputs, and of `mixed` inputs for the last one."""
        self.q_proj = resized(self.q_proj, outputs=queries)
        self.k_proj = resized(self.k_proj, outputs=keys)
        self.v_proj = resized(self.v_proj, outputs=values)
        self.o_proj = resized(self.o_proj, inputs=mixed)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        shape = hidden_states.shape[:-1]
        query, key, value, *factors = self.projected(hidden_states)
        if self.norms == "row":
            query, key = self.q_norm(query), self.k_norm(key)
        dim = self.head_dim if self.pairs is None else 2 * self.pairs.shape[1]
        query, key = (states.view(*shape, -1, dim) for states in (query, key))
        if self.norms == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = value.view(*shape, key.shape[-2], -1).transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        query, key = self.positioned(query, key, position_embeddings, kwargs.get("position_ids"))
        cache = past_key_values if cache is None else cache  # the name in older versions of transformers
        if cache is not None:
            key, value = remembered(cache, self.layer_idx, key, value, kwargs.get("cache_position"))
        attend = ATTENTION(self.config._attn_implementation, self.stock.eager_attention_forward)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        mixed, weights = attend(self, query, key, value, attention_mask, **options, **self.options(), **kwargs)
        mixed = mixed.reshape(*shape, -1)
        return self.o_proj(mixed * factors[0] if factors else mixed), weights


class PrunedBlock:
    """A decoder block in which the attention or the MLP may be missing, with the norms around it."""

    attention_class = None
    """the class of its attention"""
    attention_norms = ("input_layernorm", None)
    """the norms before and behind the attention"""
    mlp_norms = ("post_attention_layernorm", None)
    """the norms before and behind the MLP"""
    answered = property(lambda self: self.mlp)
    """the function that returns the output of the MLP"""

    def forward(self, hidden_states, **kwargs):
        if self.mixer is not None:
            mixed = self.mixed(self.normed(self.attention_norms[0], hidden_states), **kwargs)
            hidden_states = self.added(hidden_states, self.normed(self.attention_norms[1], mixed))
        if self.mlp is not None:
            mixed = self.answered(self.normed(self.mlp_norms[0], hidden_states))
            hidden_states = self.added(hidden_states, self.normed(self.mlp_norms[1], mixed))
        return hidden_states

    @property
    def mixer(self):
        """The attention; None where it is removed."""
        return self.self_attn

    def mixed(self, states, **kwargs):
        """Return the output of the mixer."""
        return self.mixer(hidden_states=states, **kwargs)[0]

    def normed(self, norm, states):
        """Return the states after a norm, if there is one."""
        return states if norm is None else getattr(self, norm)(states)

    def added(self, hidden_states, mixed):
        """Return the hidden states plus the output of a sub-block."""
        return hidden_states + mixed

    def shrink(self, shape, group):
        """Give a stock block the layers of a shape, with `group` query heads for each KV head."""
        self.shrink_mixer(shape, group)
        if shape["mlp_width"]:
            self.shrink_mlp(shape["mlp_width"])
        else:
            self.remove("mlp", *self.mlp_norms)

    def shrink_mixer(self, shape, group):
        """Give the attention its heads, or remove it."""
        attention, kv_heads = self.self_attn, shape["kv_heads"]
        if kv_heads:
            attention.__class__ = self.attention_class
            dim = 2 * shape["pairs"] if "pairs" in shape else attention.head_dim
            if "pairs" in shape:
                attention.register_buffer("kept_pairs", torch.zeros(kv_heads, shape["pairs"], dtype=torch.int64))
            keys, values = kv_heads * dim, kv_heads * shape["value_dim"]
            attention.shrink(group * keys, keys, values, group * values)
        else:
            self.remove("self_attn", *self.attention_norms)

    def shrink_mlp(self, width):
        """Give the MLP this number of units."""
        self.mlp.gate_proj = resized(self.mlp.gate_proj, outputs=width)
        self.mlp.up_proj = resized(self.mlp.up_proj, outputs=width)
        self.mlp.down_proj = resized(self.mlp.down_proj, inputs=width)

    def remove(self, *names):
        """Remove sub-modules."""
        for name in names:
            if name is not None:
                setattr(self, name, None)


class PrunedModel:
    """A model that is built as the stock class builds it, then narrowed block by block."""

    block_class = None
    """the class of its blocks"""
    blocks = "model.layers"
    """the path of its blocks"""

    def __init__(self, config):
        super().__init__(config)
        config = config.get_text_config()
        # Read from the dict: transformers refuses the field where blocks have heads of their own.
        group = config.num_attention_heads // vars(config).get("num_key_value_heads", config.num_attention_heads)
        for block, shape in zip(self.get_submodule(self.blocks), config.optprune_shapes, strict=True):
            block.__class__, block.config = self.block_class, config
            block.shrink(shape, group)
        self.number_caches()

    def number_caches(self):
        """Number the caches of the blocks' mixers, from the first cache of each kind (full, sliding, recurrent).

        transformers reads the length off the first cache of a kind, so a block without a mixer takes the kind of the
        next one that has it, and of the last one at the end.
        """
        mixers = [block.mixer for block in self.get_submodule(self.blocks)]
        present = [index for index, mixer in enumerate(mixers) if mixer is not None]
        kinds = getattr(self.config.get_text_config(), "layer_types", None) or [None] * len(mixers)  # all of one
        kinds[:] = [kinds[next((i for i in present if i >= index), present[-1])] for index in range(len(mixers))]
        free = {kind: [index for index, other in enumerate(kinds) if other == kind] for kind in kinds}
        for index in present:
            mixers[index].layer_idx = free[kinds[index]].pop(0)


def resized(layer, inputs=None, outputs=None):
    """Return a new linear layer like another one, with another number of inputs or outputs."""
    return nn.Linear(
        layer.in_features if inputs is None else inputs,
        layer.out_features if outputs is None else outputs,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
