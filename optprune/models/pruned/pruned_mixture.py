"""Decoder blocks with experts, pruned by optprune: what those families share; needs torch and transformers only."""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .pruned_decoder import PrunedBlock


class PrunedMixtureBlock(PrunedBlock):
    """A decoder block in whose place of an MLP a router chooses among experts, of which there may be fewer."""

    def shrink(self, shape, group):
        if shape["mlp_width"]:
            experts, count = self.mlp.experts, shape["experts"]
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, name)
                setattr(experts, name, nn.Parameter(weight.new_empty(count, *weight.shape[1:])))
            gate = self.mlp.gate
            gate.weight = nn.Parameter(gate.weight.new_empty(count, gate.weight.shape[1]))
            experts.num_experts = gate.num_experts = count
        super().shrink(shape, group)

    def shrink_mlp(self, width):
        """All experts are as wide as the config says."""


def name_experts(model_type):
    """Have transformers read the experts of models of a type from the matrices of each, as it reads Qwen's."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
