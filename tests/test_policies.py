"""Propagation policies: what each of the five means, stated literally and measured on models put together by hand."""

import copy

import pytest
from torch import Tensor, nn

from optprune.models import POLICIES
from optprune.objectives import LayerContext, linked
from optprune.pipeline import prune
from optprune.problems import LayerLoss, Problem
from optprune.recipe import Recipe
from tests.test_pipeline import batches, inputs_of
from tests.tiny_models import tiny_llama

FLAGS = {
    # pruned_prefix, sequential, dense_target, same_inputs; and whether two paths are followed
    "dense": (False, False, False, False, False),
    "pruned": (True, False, False, False, False),
    "intra": (False, True, True, False, False),
    "cross": (True, True, True, False, True),
    "local": (True, True, True, True, False),
}
FIRST, LAST = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
SEES = {
    # What is pruned where the layer's inputs are taken from, and where its targets are: nothing, the block before
    # ("before"), the attention of the layer's own block ("within"), or both.
    "dense": {FIRST: ("nothing", "nothing"), LAST: ("nothing", "nothing")},
    "pruned": {FIRST: ("before", "before"), LAST: ("before", "before")},
    "intra": {FIRST: ("nothing", "nothing"), LAST: ("within", "nothing")},
    "cross": {FIRST: ("before", "nothing"), LAST: ("both", "nothing")},
    "local": {FIRST: ("before", "before"), LAST: ("both", "before")},
}


def test_the_flags_of_every_policy() -> None:
    assert {
        name: (each.pruned_prefix, each.sequential, each.dense_target, each.same_inputs, each.two_paths)
        for name, each in POLICIES.items()
    } == FLAGS
    assert all(name == each.name for name, each in POLICIES.items())


def put_together(dense: nn.Module, pruned: nn.Module, what: str) -> nn.Module:
    """The dense model with the pruned one's first block, its second attention, or both."""
    model = copy.deepcopy(dense)
    if what in ("before", "both"):
        model.model.layers[0] = pruned.model.layers[0]
    if what in ("within", "both"):
        model.model.layers[1].self_attn = pruned.model.layers[1].self_attn
    return model


def statistics(weight: Tensor, inputs: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor]:
    """E[x* x*^T] and W E[x x*^T], from the samples."""
    return inputs.T @ inputs / len(inputs), weight.double() @ ideal.T @ inputs / len(inputs)


def apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest difference of an entry, as a share of the largest entry of the same matrix."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_second_block_sees_what_its_policy_says(policy: str) -> None:
    dense = tiny_llama()
    pruned, losses = copy.deepcopy(dense), dict[str, LayerLoss]()

    def objective(context: LayerContext) -> Problem:
        losses[context.name] = context.loss
        return linked(context)

    prune(pruned, batches(), Recipe(objective=objective, units="all", sparsity=0.4, propagation=policy, damping=0.0))
    for layer, said in SEES[policy].items():
        weight, loss = dense.get_submodule(layer).weight.detach(), losses[layer]
        seen = {what: inputs_of(put_together(dense, pruned, what), layer) for what in ("nothing", "before")}
        if layer == LAST:
            seen |= {what: inputs_of(put_together(dense, pruned, what), layer) for what in ("within", "both")}
        found = loss.gram.double(), loss.target.double()
        for inputs in seen:
            for targets in seen:
                distance = apart(found, statistics(weight, seen[inputs], seen[targets]))
                # The model computes in float32: a few hundred roundings of the largest entry at most. Whatever else
                # is pruned moves an entry by far more than that.
                assert distance <= 1e-5 if (inputs, targets) == said else distance >= 1e-3, (layer, inputs, targets)
