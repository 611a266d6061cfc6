"""Experts that are replaced or merged, in memory: MoNE and HC-SMoE, whose models need classes of their own.

The router stays whole in both, so a token that chose a removed expert gets a constant in its place, or the expert that
its cluster was merged into. A stock folder of transformers holds neither.
"""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn

from optprune.models import Decoder
from optprune.models.mixture import DOWN, GATE, UP, SeparateExperts, experts_in, separate


@dataclass
class Routed:
    """What the router of one block did on the calibration tokens, in the dense model."""

    inputs: Tensor
    """[tokens, hidden]"""
    chosen: Tensor
    """[tokens, k]"""

    def counts(self, experts: int) -> Tensor:
        return torch.bincount(self.chosen.flatten(), minlength=experts)

    def tokens_of(self, expert: int) -> Tensor:
        return self.inputs[torch.any(self.chosen == expert, 1)]


class ReplacedExperts(nn.Module):
    """Experts of which some answer with a constant, or by another expert."""

    def __init__(self, experts: SeparateExperts, answered_by: list[int], constants: dict[int, Tensor]) -> None:
        super().__init__()
        self.experts, self.answered_by, self.constants = experts, answered_by, constants

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number, other in enumerate(self.answered_by):
            tokens, places = torch.where(top_k_index == number)
            inputs = hidden_states[tokens]
            constant = self.constants.get(number)
            output = self.experts.outputs(inputs, other) if constant is None else constant.expand_as(inputs)
            total = total.index_add(0, tokens, output * top_k_weights[tokens, places, None])
        return total


def routed(decoder: Decoder, batches: list[Tensor]) -> list[Routed]:
    """Return the inputs and the choices of every router on the batches."""
    mixture = decoder.architecture.mixture
    assert mixture is not None
    inputs: list[list[Tensor]] = [[] for _ in decoder.blocks]
    handles = []
    for block, seen in zip(decoder.blocks, inputs, strict=True):

        def keep(_: nn.Module, args: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0].flatten(0, -2))

        handles.append(block.get_submodule(mixture.module).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            decoder.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for block, seen in zip(decoder.blocks, inputs, strict=True):
        tokens = torch.cat(seen)
        with torch.no_grad():
            logits = block.get_submodule(mixture.router)(tokens)[0]
        found.append(Routed(tokens, logits.topk(decoder.experts_for_a_token).indices))
    return found


@torch.no_grad()
def mone(decoder: Decoder, batches: list[Tensor], keep: int) -> None:
    """Replace experts by the means of their outputs: MoNE (arXiv 2507.00390).

    Those with the smallest product of the tokens they get and the norm of the standard deviation of their outputs go.
    """
    for block, seen in zip(decoder.blocks, routed(decoder, batches), strict=True):
        experts, mixture = _experts(decoder, block)
        counts = seen.counts(experts.count)
        outputs = [experts.outputs(seen.tokens_of(number), number) for number in range(experts.count)]
        spread = torch.stack([each.std(0).norm() if len(each) > 1 else each.new_zeros(()) for each in outputs])
        gone = (counts * spread).topk(experts.count - keep, largest=False).indices.tolist()
        constants = {number: outputs[number].sum(0) / max(len(outputs[number]), 1) for number in gone}
        replaced = ReplacedExperts(experts, list(range(experts.count)), constants)
        block.set_submodule(mixture.experts, replaced)


@torch.no_grad()
def hc_smoe(decoder: Decoder, batches: list[Tensor], keep: int) -> None:
    """Merge clusters of experts: HC-SMoE (arXiv 2410.08589), with its defaults.

    Clusters are those of average linkage over the mean outputs of the experts for all tokens; the weights of a cluster
    are averaged by the tokens that its experts get.
    """
    for block, seen in zip(decoder.blocks, routed(decoder, batches), strict=True):
        experts, mixture = _experts(decoder, block)
        counts = seen.counts(experts.count).double()
        means = torch.stack([experts.outputs(seen.inputs, number).mean(0) for number in range(experts.count)])
        labels = fcluster(linkage(means.double().numpy(), "average"), keep, "maxclust")
        answered_by = [int((labels == label).argmax()) for label in labels]
        for first in set(answered_by):
            members = [number for number, other in enumerate(answered_by) if other == first]
            shares = counts[members] / counts[members].sum().clamp(min=1)
            for name in (GATE, UP, DOWN):
                matrices = [experts[str(number)].get_submodule(name).get_parameter("weight") for number in members]
                merged = sum(share * matrix.double() for share, matrix in zip(shares, matrices, strict=True))
                assert isinstance(merged, Tensor)
                matrices[0].copy_(merged)
        block.set_submodule(mixture.experts, ReplacedExperts(experts, answered_by, {}))


def _experts(decoder: Decoder, block: nn.Module) -> tuple[SeparateExperts, Any]:
    mixture = decoder.architecture.mixture
    assert mixture is not None
    separate(block, mixture)
    experts = experts_in(block, mixture)
    assert isinstance(experts, SeparateExperts)
    return experts, mixture
