"""Decoder blocks of different shapes, pruned by optprune: what all families share; needs torch and transformers only.

`config.optprune_shapes` says what each block holds: {"mlp_width": 1024, "kv_heads": 2, "value_dim": 48}. A block with
kv_heads 0 has no attention, one with mlp_width 0 no MLP; one with experts also says how many. The config's other fields
are those of the stock class.
"""

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .pruned_cache import remembered

ATTENTION = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", ALL_ATTENTION_FUNCTIONS.get)  # transformers 5, or 4.57


class PrunedAttention:
    """Reads the numbers of heads and of value dimensions off the weights; the cache is as small as they are."""

    stock = None
    """the module of the stock classes, whose functions rotate and attend"""
    norms = None
    """what one norm of queries and of keys goes over, where they have any: "head", or "row" for all heads together"""
    use_rope = True
    """whether queries and keys are rotated"""

    def options(self):
        """What else the family tells its attention."""
        return {}

    def projected(self, hidden_states):
        """The queries, keys and values of all heads."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def shrink(self, queries, keys, values, mixed):
        """Give it layers of so many outputs, and one of so many inputs behind them."""
        self.q_proj = resized(self.q_proj, outputs=queries)
        self.k_proj = resized(self.k_proj, outputs=keys)
        self.v_proj = resized(self.v_proj, outputs=values)
        self.o_proj = resized(self.o_proj, inputs=mixed)

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
        query, key, value = self.projected(hidden_states)
        if self.norms == "row":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (states.view(*shape, -1, self.head_dim) for states in (query, key))
        if self.norms == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = value.view(*shape, key.shape[-2], -1).transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.use_rope:
            query, key = self.stock.apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = remembered(cache, self.layer_idx, key, value, kwargs.get("cache_position"))
        attend = ATTENTION(self.config._attn_implementation, self.stock.eager_attention_forward)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        mixed, weights = attend(self, query, key, value, attention_mask, **options, **self.options(), **kwargs)
        return self.o_proj(mixed.reshape(*shape, -1)), weights


class PrunedBlock:
    """A decoder block in which the attention or the MLP may be missing, with the norms around it."""

    attention_class = None
    """the class of its attention"""
    attention_norms = ("input_layernorm", None)
    """the norms before and behind the attention"""
    mlp_norms = ("post_attention_layernorm", None)
    """the norms before and behind the MLP"""

    def forward(self, hidden_states, **kwargs):
        if self.self_attn is not None:
            entry = self.normed(self.attention_norms[0], hidden_states)
            mixed, _ = self.self_attn(hidden_states=entry, **kwargs)
            hidden_states = self.added(hidden_states, self.normed(self.attention_norms[1], mixed))
        if self.mlp is not None:
            mixed = self.mlp(self.normed(self.mlp_norms[0], hidden_states))
            hidden_states = self.added(hidden_states, self.normed(self.mlp_norms[1], mixed))
        return hidden_states

    def normed(self, norm, states):
        """The states behind a norm, where there is one."""
        return states if norm is None else getattr(self, norm)(states)

    def added(self, hidden_states, mixed):
        """The hidden states with what a sub-block adds."""
        return hidden_states + mixed

    def shrink(self, shape, group):
        """Give a block that the stock class made the layers of a shape, with `group` query heads to a KV head."""
        attention, kv_heads = self.self_attn, shape["kv_heads"]
        if kv_heads:
            attention.__class__ = self.attention_class
            keys, values = kv_heads * attention.head_dim, kv_heads * shape["value_dim"]
            attention.shrink(group * keys, keys, values, group * values)
        else:
            self.remove("self_attn", *self.attention_norms)
        if shape["mlp_width"]:
            self.shrink_mlp(shape["mlp_width"])
        else:
            self.remove("mlp", *self.mlp_norms)

    def shrink_mlp(self, width):
        """Give the MLP so many units."""
        self.mlp.gate_proj = resized(self.mlp.gate_proj, outputs=width)
        self.mlp.up_proj = resized(self.mlp.up_proj, outputs=width)
        self.mlp.down_proj = resized(self.mlp.down_proj, inputs=width)

    def remove(self, *names):
        """Leave out sub-modules."""
        for name in names:
            if name is not None:
                setattr(self, name, None)


class PrunedModel:
    """Built as the stock class builds it, then narrowed block by block."""

    block_class = None
    """the class of its blocks"""
    blocks = "model.layers"
    """where its blocks are"""

    def __init__(self, config):
        super().__init__(config)
        heads = config.num_attention_heads
        group = heads // getattr(config, "num_key_value_heads", heads)
        for block, shape in zip(self.get_submodule(self.blocks), config.optprune_shapes, strict=True):
            block.__class__ = self.block_class
            block.shrink(shape, group)
        self.number_caches()

    def number_caches(self):
        """Give caches to the blocks with attention, those of each kind (full, sliding window) from its first on.

        transformers reads the length off the first cache of a kind, so a block without attention takes the kind of
        the next one that has it, and of the last one at the end.
        """
        blocks = self.get_submodule(self.blocks)
        present = [index for index, block in enumerate(blocks) if block.self_attn is not None]
        kinds = getattr(self.config, "layer_types", None)
        kinds = [None] * len(blocks) if kinds is None else kinds  # all of one
        kinds[:] = [kinds[next((i for i in present if i >= index), present[-1])] for index in range(len(blocks))]
        free = {kind: [index for index, other in enumerate(kinds) if other == kind] for kind in kinds}
        for index in present:
            blocks[index].self_attn.layer_idx = free[kinds[index]].pop(0)


def resized(layer, inputs=None, outputs=None):
    """A fresh linear layer like another one, with another number of inputs or outputs."""
    return nn.Linear(
        layer.in_features if inputs is None else inputs,
        layer.out_features if outputs is None else outputs,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
