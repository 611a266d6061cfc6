"""A block's work as a value: the same task gives the same bytes wherever and in whatever order it is run."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.tiny_models import TINY_MODELS
from optprune import load_recipe, prune
from optprune.calibration import POLICIES, Path, Stream, advance, calibrating, first_inputs
from optprune.metric import Metrics
from optprune.models import BlockAllocation, Decoder
from optprune.program import BlockProgram
from optprune.pruning.block import BlockTask, prune_block
from optprune.recipe import Recipe
from tests.helpers.programs import program_of
from tests.helpers.short_runs import batches

INDEPENDENT = [name for name, policy in POLICIES.items() if policy.independent]


def task_of(decoder: Decoder, recipe: Recipe, index: int, path: Path) -> BlockTask:
    program = program_of(recipe, decoder=decoder)
    block = program.block(index, program.expected(index))
    return BlockTask(block=block, method=program.method, path=path, metrics=Metrics({}))


@pytest.mark.parametrize("recipe", ["fasp", "sparsegpt"])
@pytest.mark.parametrize("policy", INDEPENDENT)
@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS)
def test_blocks_of_independent_policies_can_be_pruned_in_any_order(make, policy: str, recipe: str) -> None:
    dense, settings = make(), load_recipe(recipe, {"propagation": policy})
    whole = copy.deepcopy(dense)
    prune(whole, batches(), settings)
    last = len(Decoder(dense).blocks) - 1
    for index in range(last, -1, -1):
        decoder = Decoder(copy.deepcopy(dense))  # in which every other block is as it was
        with calibrating(decoder):
            path = settings.propagation.start(entering(decoder, index))
            result = prune_block(decoder, task_of(decoder, settings, index, path), lambda event: None)
        pruned = Decoder(whole)
        assert result.record.shape == pruned.shape(index)
        assert result.weights.keys() == dict(pruned.blocks[index].named_parameters()).keys()
        for name, weight in result.weights.items():
            assert torch.equal(weight, pruned.blocks[index].get_parameter(name)), name


def entering(decoder: Decoder, index: int) -> Stream:
    """What enters a block of the dense model."""
    stream = first_inputs(decoder, batches())
    for block in range(index):
        advance(decoder.blocks[block], stream)
    return stream


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in INDEPENDENT])
def test_a_block_of_a_policy_that_drifts_goes_on_from_the_path_before_it(policy: str) -> None:
    dense, settings = TINY_MODELS["llama"](), load_recipe("fasp", {"propagation": policy})
    whole, decoder = copy.deepcopy(dense), Decoder(dense)
    prune(whole, batches(), settings)
    with calibrating(decoder):
        path = settings.propagation.start(entering(decoder, 0))
        first = prune_block(decoder, task_of(Decoder(TINY_MODELS["llama"]()), settings, 0, path), lambda event: None)
        apart = Decoder(copy.deepcopy(dense))
        task = task_of(Decoder(TINY_MODELS["llama"]()), settings, 1, first.path)
        second = prune_block(apart, task, lambda event: None)
    for result in (first, second):
        for name, weight in result.weights.items():
            assert torch.equal(weight, Decoder(whole).blocks[result.record.index].get_parameter(name)), name


def test_nothing_travels_past_the_last_block_that_has_something_to_solve() -> None:
    decoder = Decoder(TINY_MODELS["llama"]())
    recipe = load_recipe("magnitude")
    with calibrating(decoder):
        path = recipe.propagation.start(entering(decoder, 0))
        task = task_of(decoder, recipe, 0, path)
        untouched = BlockProgram(0, BlockAllocation(decoder.shape(0)))
        dense = replace(task, block=untouched, onwards=False)
        before = [hidden.clone() for hidden in path.actual.hidden]
        result = prune_block(decoder, dense, lambda event: None)
    assert (result.record.layers, result.record.floor_seconds) == ((), 0.0)
    assert all(map(torch.equal, result.path.actual.hidden, before))
