"""Decoder blocks with experts, pruned by optprune, for those families; needs torch and transformers only."""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .pruned_decoder import PrunedBlock


class PrunedMixtureBlock(PrunedBlock):
    """A decoder block with a router and any number of experts in place of the MLP, or with one MLP."""

    def shrink(self, shape, group):
        if shape["mlp_width"] and shape.get("experts"):
            experts, gate, count, width = self.mlp.experts, self.mlp.gate, shape["experts"], shape["mlp_width"]
            hidden = gate.weight.shape[1]
            for name, sizes in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
                setattr(experts, name, nn.Parameter(getattr(experts, name).new_empty(count, *sizes)))
            gate.weight = nn.Parameter(gate.weight.new_empty(count, hidden))
            for name, buffer in gate.named_buffers():  # a number for each expert
                gate.register_buffer(name, buffer[:count].clone())
            experts.num_experts = gate.num_experts = count
            experts.intermediate_dim = width
        super().shrink(shape, group)

    def shrink_mlp(self, width):
        """Give an MLP this number of units; the experts' width is set with their number."""
        if not hasattr(self.mlp, "experts"):
            super().shrink_mlp(width)


def name_experts(model_type):
    """Register that checkpoints of a model type hold the matrices of each expert, as Qwen's do."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
