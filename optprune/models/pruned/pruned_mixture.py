"""Decoder blocks with experts, pruned by optprune, for those families; needs torch and transformers only."""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from .pruned_decoder import PrunedBlock


class PrunedMixtureBlock(PrunedBlock):
    """A decoder block with a router and any number of experts in place of the MLP, or with one MLP."""

    router_name = "gate"
    """the name of the router in the MLP"""
    width = "intermediate_dim"
    """the name of the experts' attribute that holds their width"""

    @property
    def routed(self):
        """The module with the router and the experts."""
        return self.mlp

    def shrink(self, shape, group):
        if shape["mlp_width"] and shape.get("experts"):
            experts, router = self.routed.experts, self.scoring(getattr(self.routed, self.router_name))
            count, width, hidden = shape["experts"], shape["mlp_width"], router.weight.shape[1]
            for name, sizes in self.expert_sizes(width, hidden).items():
                setattr(experts, name, nn.Parameter(getattr(experts, name).new_empty(count, *sizes)))
            for name, rows in list(router.named_parameters()):  # one for each expert
                setattr(router, name, nn.Parameter(rows.new_empty(count, *rows.shape[1:])))
            for name, buffer in router.named_buffers():
                router.register_buffer(name, buffer[:count].clone())
            experts.num_experts = router.num_experts = count
            setattr(experts, self.width, width)
        super().shrink(shape, group)

    def scoring(self, router):
        """Return the module of a router whose parameters have a row for each expert."""
        return router

    def expert_sizes(self, width, hidden):
        """Return the sizes of the tensors of all experts by name, for each expert."""
        return {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}

    def shrink_mlp(self, width):
        """Give an MLP this number of units; the experts' width is set with their number."""
        if not hasattr(self.routed, "experts"):
            super().shrink_mlp(width)


def name_experts(model_type, like="qwen2_moe"):
    """Register that checkpoints of a model type hold the matrices of each expert, as those of another type do."""
    matrices = [each for each in get_checkpoint_conversion_mapping(like) if isinstance(each, WeightConverter)]
    register_checkpoint_conversion_mapping(model_type, matrices, overwrite=True)
