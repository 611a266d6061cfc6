"""Granite 4 with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.granitemoehybrid import modeling_granitemoehybrid as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel, resized
from .pruned_mixture import PrunedMixtureBlock
from .pruned_recurrent import PrunedHybridBlock


class PrunedGraniteMoeHybridConfig(stock.GraniteMoeHybridConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_granitemoehybrid"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGraniteMoeHybridAttention(PrunedAttention, stock.GraniteMoeHybridAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock

    def positioned(self, query, key, position_embeddings, position_ids):
        if position_embeddings is None:
            return query, key
        return super().positioned(query, key, position_embeddings, position_ids)


class PrunedGraniteMoeHybridDecoderLayer(PrunedMixtureBlock, PrunedHybridBlock, stock.GraniteMoeHybridDecoderLayer):
    """Decoder block of any width, or any number of experts beside an MLP, with or without its sub-blocks."""

    attention_class = PrunedGraniteMoeHybridAttention
    recurrent = "mamba"
    counted = ()
    mlp_module = "shared_mlp"
    router_name = "router"
    routed = property(lambda self: self.block_sparse_moe)

    def added(self, hidden_states, mixed):
        return hidden_states + mixed * self.residual_multiplier

    def answered(self, states):
        return self.mlp(states) if self.routed is None else self.routed(states) + self.mlp(states)

    def remove(self, *names):
        super().remove(*names, *(("block_sparse_moe",) if "mlp" in names else ()))

    def shrink_mlp(self, width):
        if self.routed is None:  # else the width is that of the experts
            self.mlp.input_linear = resized(self.mlp.input_linear, outputs=2 * width)
            self.mlp.output_linear = resized(self.mlp.output_linear, inputs=width)


class PrunedGraniteMoeHybridForCausalLM(PrunedModel, stock.GraniteMoeHybridForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGraniteMoeHybridConfig
    block_class = PrunedGraniteMoeHybridDecoderLayer
    _no_split_modules = ["PrunedGraniteMoeHybridDecoderLayer"]


# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedGraniteMoeHybridConfig.register_for_auto_class()
PrunedGraniteMoeHybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")
