"""Propagation policies: the meaning of each of the six, stated literally and measured on models made by hand."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from optprune.allocation import Allocation
from optprune.calibration import POLICIES, Stream, moments_pass, propagation, stream
from optprune.calibration.stream import run_block
from optprune.models import BlockAllocation, Decoder
from optprune.models.places import OnDevice, States
from optprune.objectives import LayerContext, linked
from optprune.problems import LayerLoss, Problem
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.layer_inputs import apart, inputs_of, statistics
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

FACTS = {
    # independent, sequential, dense_target; and whether two paths are followed
    "dense": (True, False, False, False),
    "pruned": (False, False, False, False),
    "intra": (True, True, True, False),
    "cross": (False, True, True, True),
    "partial": (False, True, True, True),
    "local": (False, True, True, False),
}
FIRST, LAST = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
SEES = {
    # What is pruned where the layer's inputs are taken from, and where its targets are: nothing, the block before
    # ("before"), the attention of the layer's own block ("within"), or both; or targets are half way between those
    # of the layer's inputs and of a model in which nothing is pruned ("halfway").
    "dense": {FIRST: ("nothing", "nothing"), LAST: ("nothing", "nothing")},
    "pruned": {FIRST: ("before", "before"), LAST: ("before", "before")},
    "intra": {FIRST: ("nothing", "nothing"), LAST: ("within", "nothing")},
    "cross": {FIRST: ("before", "nothing"), LAST: ("both", "nothing")},
    "partial": {FIRST: ("before", "halfway"), LAST: ("both", "halfway")},
    "local": {FIRST: ("before", "before"), LAST: ("both", "before")},
}


def test_the_facts_of_every_policy() -> None:
    assert POLICIES.keys() == FACTS.keys()
    for name, policy in POLICIES.items():
        path = policy.start(Stream(States(OnDevice(), [torch.zeros(1, 1, 1)]), [[{}]]))
        two_paths = path.dense is not path.actual
        assert (policy.independent, policy.sequential, policy.dense_target, two_paths) == FACTS[name]
        assert policy.name == name
        # The list is the stream's own: a block replaces its entries one by one.
        assert (path.dense.hidden is not path.actual.hidden) == two_paths


def put_together(dense: nn.Module, pruned: nn.Module, what: str) -> nn.Module:
    """The dense model with the pruned one's first block, its second attention, or both."""
    model = copy.deepcopy(dense)
    if what in ("before", "both"):
        model.model.layers[0] = pruned.model.layers[0]
    if what in ("within", "both"):
        model.model.layers[1].self_attn = pruned.model.layers[1].self_attn
    return model


@pytest.mark.e2e
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
        if "halfway" in said:
            seen["halfway"] = (seen[said[0]] + seen["nothing"]) / 2
        found = loss.gram.double(), loss.target.double()
        for inputs in seen:
            for targets in seen:
                distance = apart(found, statistics(weight, seen[inputs], seen[targets]))
                # The model computes in float32: a few hundred roundings of the largest entry at most. Whatever else
                # is pruned moves an entry by far more than that.
                assert distance <= 1e-5 if (inputs, targets) == said else distance >= 1e-3, (layer, inputs, targets)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", ["fasp", "sparsegpt"])
def test_blocks_are_as_independent_as_their_policy_says(recipe: str, policy: str) -> None:
    """The second block's weights, with the first block as it was and with less of it."""
    found = []
    for less in (False, True):
        model = tiny_llama()
        decoder = Decoder(model)
        first, second = map(BlockAllocation, decoder.shapes())
        if recipe == "fasp":
            first = BlockAllocation(first.shape.without("attention")) if less else first
            second = BlockAllocation(replace(second.shape, mlp_width=77))
        else:
            first = replace(first, shares=dict.fromkeys(decoder.paths(0), 0.25)) if less else first
            second = replace(second, shares=dict.fromkeys(decoder.paths(1), 0.5))
        settings = {"propagation": policy, "refit.held_out": 0.25, "refit.recovery": 1}
        prune(model, batches(), load_recipe(recipe, settings), allocation=Allocation.of(decoder, [first, second]))
        found.append(Decoder(model).blocks[1].state_dict().values())
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert same == POLICIES[policy].independent


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", ["fasp", "sparsegpt"])
def test_the_floor_is_two_passes_of_every_block(recipe: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts passes of blocks, however many of them a policy makes."""
    passes = [0]

    def counted(*args: Any, **options: Any) -> Any:
        passes[0] += 1
        return run_block(*args, **options)

    for module in (moments_pass, stream):
        monkeypatch.setattr(module, "run_block", counted)
    for module in (moments_pass, propagation):
        monkeypatch.setattr(module, "clock", lambda device: float(passes[0]))
    report = prune(tiny_llama(), batches(), load_recipe(recipe, {"propagation": policy}))
    assert report.floor_seconds == 2 * len(batches()) * 2
