"""Falcon-H1 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.falcon_h1 import modeling_falcon_h1 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention
from .pruned_recurrent import PrunedParallelBlock, PrunedParallelModel


class PrunedFalconH1Config(stock.FalconH1Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_falcon_h1"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedFalconH1Attention(PrunedAttention, stock.FalconH1Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock

    def positioned(self, query, key, position_embeddings, position_ids):
        return super().positioned(query, key * self.key_multiplier, position_embeddings, position_ids)


class PrunedFalconH1DecoderLayer(PrunedParallelBlock, stock.FalconH1DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedFalconH1Attention
    recurrent = "mamba"
    mlp_norms = ("pre_ff_layernorm", None)
    mlp_module = "feed_forward"

    def mixed_by_attention(self, states, mamba_attention_mask=None, **kwargs):
        return self.self_attn(states * self.attention_in_multiplier, **kwargs)[0] * self.attn_out_multiplier

    def mixed_by_state(self, states, attention_mask=None, mamba_attention_mask=None, **kwargs):
        return self.mamba(states, attention_mask=mamba_attention_mask, **self.taken(kwargs)) * self.ssm_out_multiplier


class PrunedFalconH1ForCausalLM(PrunedParallelModel, stock.FalconH1ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedFalconH1Config
    block_class = PrunedFalconH1DecoderLayer
    _no_split_modules = ["PrunedFalconH1DecoderLayer"]

    def initialize_weights(self):
        super().initialize_weights()
        for block in self.model.layers:
            if block.mamba is not None:  # a buffer of the multipliers that no file holds
                block.mamba.mup_vector.data.copy_(stock.compute_mup_vector(self.config))


# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedFalconH1Config.register_for_auto_class()
PrunedFalconH1ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
