"""Phi-3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.phi3 import modeling_phi3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel, resized


class PrunedPhi3Config(stock.Phi3Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_phi3"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedPhi3Attention(PrunedAttention, stock.Phi3Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock

    def options(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}

    def projected(self, hidden_states):
        rows, group = self.qkv_proj(hidden_states), self.num_key_value_groups
        values = self.o_proj.in_features // group
        keys = (rows.shape[-1] - values) // (group + 1)
        return rows.split((group * keys, keys, values), dim=-1)

    def shrink(self, queries, keys, values, mixed):
        self.qkv_proj = resized(self.qkv_proj, outputs=queries + keys + values)
        self.o_proj = resized(self.o_proj, inputs=mixed)


class PrunedPhi3DecoderLayer(PrunedBlock, stock.Phi3DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedPhi3Attention

    def added(self, hidden_states, mixed):
        return hidden_states + self.resid_attn_dropout(mixed)  # behind the MLP there is one like it

    def shrink_mlp(self, width):
        self.mlp.gate_up_proj = resized(self.mlp.gate_up_proj, outputs=2 * width)
        self.mlp.down_proj = resized(self.mlp.down_proj, inputs=width)


class PrunedPhi3ForCausalLM(PrunedModel, stock.Phi3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedPhi3Config
    block_class = PrunedPhi3DecoderLayer
    _no_split_modules = ["PrunedPhi3DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedPhi3Config.register_for_auto_class()
PrunedPhi3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
