"""Ministral 3 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.ministral3 import modeling_ministral3 as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedMinistral3Config(stock.Ministral3Config):
    """The stock config with a shape for each block."""

    model_type = "pruned_ministral3"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedMinistral3Attention(PrunedAttention, stock.Ministral3Attention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def positioned(self, query, key, position_embeddings, position_ids):
        query, key = super().positioned(query, key, position_embeddings, position_ids)
        rotary = self.config.rope_parameters
        scale = stock.get_llama_4_attn_scale(
            position_ids, rotary.get("llama_4_scaling_beta"), rotary.get("original_max_position_embeddings")
        )
        return query * scale.to(query.dtype), key

    def options(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class PrunedMinistral3DecoderLayer(PrunedBlock, stock.Ministral3DecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedMinistral3Attention


class PrunedMinistral3ForCausalLM(PrunedModel, stock.Ministral3ForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedMinistral3Config
    block_class = PrunedMinistral3DecoderLayer
    _no_split_modules = ["PrunedMinistral3DecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedMinistral3Config.register_for_auto_class()
PrunedMinistral3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
