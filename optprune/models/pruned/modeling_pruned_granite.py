"""Granite with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.granite import modeling_granite as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedGraniteConfig(stock.GraniteConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_granite"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGraniteAttention(PrunedAttention, stock.GraniteAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True


class PrunedGraniteDecoderLayer(PrunedBlock, stock.GraniteDecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedGraniteAttention

    def forward(self, hidden_states, **kwargs):
        hidden_states = super().forward(hidden_states, **kwargs)
        # transformers 4.57 passes whether weights are needed, and takes the first of a tuple.
        return (hidden_states, None) if "output_attentions" in kwargs else hidden_states

    def added(self, hidden_states, mixed):
        return hidden_states + mixed * self.residual_multiplier


class PrunedGraniteForCausalLM(PrunedModel, stock.GraniteForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGraniteConfig
    block_class = PrunedGraniteDecoderLayer
    _no_split_modules = ["PrunedGraniteDecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedGraniteConfig.register_for_auto_class()
PrunedGraniteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
