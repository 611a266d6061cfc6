"""GPT-NeoX with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.gpt_neox import modeling_gpt_neox as stock

from .pruned_cache import remembered
from .pruned_decoder import ATTENTION, PrunedBlock, PrunedModel, resized


class PrunedGPTNeoXConfig(stock.GPTNeoXConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_gpt_neox"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGPTNeoXAttention(stock.GPTNeoXAttention):
    """Attention whose numbers of heads and value dimensions are those of its weights and its cache."""

    def forward(self, hidden_states, attention_mask=None, layer_past=None, position_embeddings=None, **kwargs):
        shape, size, values = hidden_states.shape[:-1], self.head_size, self.dense.in_features
        rows = self.query_key_value(hidden_states)
        heads = (rows.shape[-1] - values) // (2 * size)
        states = rows.view(*shape, heads, -1).transpose(1, 2)
        query, key, value = states.split((size, size, values // heads), dim=-1)
        query, key = stock.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = remembered(layer_past, self.layer_idx, key, value, kwargs.get("cache_position"))
        attend = ATTENTION(self.config._attn_implementation, stock.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.dense(mixed.reshape(*shape, -1)), weights


class PrunedGPTNeoXLayer(PrunedBlock, stock.GPTNeoXLayer):
    """A decoder block in which the attention or the MLP may be missing, with its norm, one beside the other."""

    attention_class = PrunedGPTNeoXAttention

    @property
    def self_attn(self):
        """The attention, as others call it."""
        return self.attention

    def forward(self, hidden_states, **kwargs):
        weights, entry, mixed = None, hidden_states, hidden_states
        if self.attention is not None:
            found, weights = self.attention(self.input_layernorm(hidden_states), **kwargs)
            mixed = self.post_attention_dropout(found)
            if self.mlp is None or not self.use_parallel_residual:
                entry = mixed = mixed + hidden_states
        if self.mlp is not None:
            found = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(entry)))
            beside = self.attention is not None and self.use_parallel_residual
            mixed = found + mixed + hidden_states if beside else found + mixed
        # transformers 4.57 passes whether weights are needed, and takes the first of a tuple.
        return (mixed, weights) if "output_attentions" in kwargs else mixed

    def shrink(self, shape, group):
        heads, attention = shape["kv_heads"], self.attention
        if heads:
            attention.__class__ = self.attention_class
            rows, values = heads * (2 * attention.head_size + shape["value_dim"]), heads * shape["value_dim"]
            attention.query_key_value = resized(attention.query_key_value, outputs=rows)
            attention.dense = resized(attention.dense, inputs=values)
        else:
            self.attention = self.input_layernorm = None
        if shape["mlp_width"]:
            self.mlp.dense_h_to_4h = resized(self.mlp.dense_h_to_4h, outputs=shape["mlp_width"])
            self.mlp.dense_4h_to_h = resized(self.mlp.dense_4h_to_h, inputs=shape["mlp_width"])
        else:
            self.mlp = self.post_attention_layernorm = None


class PrunedGPTNeoXForCausalLM(PrunedModel, stock.GPTNeoXForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGPTNeoXConfig
    block_class = PrunedGPTNeoXLayer
    blocks = "gpt_neox.layers"
    _no_split_modules = ["PrunedGPTNeoXLayer"]

    def __init__(self, config):
        super().__init__(config)
        if "embed_out" in self._modules:  # the name of the head in transformers 4.57
            self.lm_head = self._modules.pop("embed_out")

    @property
    def embed_out(self):
        """The head, by its older name."""
        return self.lm_head


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGPTNeoXConfig.register_for_auto_class()
PrunedGPTNeoXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
