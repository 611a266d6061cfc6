"""Decoder blocks with experts, pruned by optprune: what those families share; needs torch and transformers only."""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .pruned_decoder import PrunedBlock


class PrunedMixtureBlock(PrunedBlock):
    """A decoder block in whose place of an MLP a router chooses among experts, of which there may be fewer."""

    def shrink(self, shape, group):
        if shape["mlp_width"]:
            experts, gate, count, width = self.mlp.experts, self.mlp.gate, shape["experts"], shape["mlp_width"]
            hidden = gate.weight.shape[1]
            for name, sizes in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
                setattr(experts, name, nn.Parameter(getattr(experts, name).new_empty(count, *sizes)))
            gate.weight = nn.Parameter(gate.weight.new_empty(count, hidden))
            experts.num_experts = gate.num_experts = count
            experts.intermediate_dim = width
        super().shrink(shape, group)

    def shrink_mlp(self, width):
        """The experts have their width with their number."""


def name_experts(model_type):
    """Have transformers read the experts of models of a type from the matrices of each, as it reads Qwen's."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
