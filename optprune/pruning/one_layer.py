"""One layer of a model: its loss, and the problem that a recipe states at it, the same as in `prune`."""

import copy
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import DenseStatistics, Path, Propagation, Visit, calibrating, first_inputs
from optprune.errors import InputError
from optprune.metric import OutputMetric
from optprune.models import Decoder
from optprune.numerics.precision import full_precision
from optprune.problems import LayerLoss, Problem
from optprune.program import Request, check_batches, resolve
from optprune.pruning.block import block_problem
from optprune.pruning.pipeline import settings_of
from optprune.pruning.run import begin
from optprune.pruning.workers import Serial
from optprune.recipe import Recipe
from optprune.report import PhaseRecorder
from optprune.system.wording import counted, shown


@full_precision()
def layer_loss(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    name: str,
    policy: str | Propagation = "pruned",
    *,
    dense: PreTrainedModel | None = None,
    damping: float = 0.01,
    fit_bias: bool = True,
    metric: OutputMetric | None = None,
) -> LayerLoss:
    """Return the loss of one linear layer of a decoder block, by its full name such as model.layers.3.mlp.down_proj.

    `model` may be pruned up to that layer, and `dense` is then the model before pruning: it gives the layer's weight W
    and its dense inputs x, and the `policy` decides which inputs x* the layer gets. Without `dense` nothing is pruned
    yet, so that x* = x under every policy. `batches`, `damping` and `fit_bias` are as in `prune`; a `metric` weighs the
    outputs. No weight of the models changes, but layers in another form (Conv1D, stacked experts) become linear layers.
    No block after the layer's is run.
    """
    now = Decoder(model)
    before = now if dense is None else Decoder(dense)
    block, path = place_of(before, name)
    _check_same(now, before, block, path)
    policy = Recipe({"propagation": policy}).propagation
    batches = check_batches(before.model.config, batches)
    tap, original = before.architecture.taps[path], before.blocks[block]
    # All layers of a block that is solved in one stage get the dense block's inputs, without its removed sub-blocks.
    left = now.shape(block).parts
    removed = () if policy.sequential else tuple(part for part in before.shape(block).parts if part not in left)
    whole = copy.deepcopy(original) if removed else original
    with calibrating(now), calibrating(before):
        inputs = policy.start(first_inputs(before, batches))
        for index in range(block):
            _visit(inputs, now.blocks[index], before.blocks[index]).close()
        with before.without((block, part) for part in removed):
            visit = _visit(inputs, now.blocks[block] if policy.sequential else original, whole)
            moments = visit.collect([tap]).moments[tap]
    layer = before.layer(block, path)
    return LayerLoss.of(layer.weight, moments, damping, fit_bias=fit_bias and layer.bias is not None, metric=metric)


@full_precision()
def layer_problem(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    name: str,
    recipe: str | Recipe,
    *,
    allocation: Allocation | Any = None,
    statistics: DenseStatistics | None = None,
    **fields: Any,
) -> Problem:
    """Return the problem that a recipe states at a layer, by the layer's full name, as `prune` gives it to a solver.

    It has the budget, the metric and the damping of the recipe, and the link of the units or the pattern of the single
    weights. If the recipe's policy takes inputs from pruned blocks, the blocks before the layer's are pruned first, in
    a copy; no later block is solved. No weight of the model changes. The recipe is a Recipe, a name or a YAML file, and
    the rest too is as in `prune`.
    """
    recipe, allocation = settings_of(recipe, allocation, fields)
    block, path = place_of(Decoder(model), name)
    every = check_batches(model.config, batches)
    independent = recipe.propagation.independent
    own = Decoder(_with_own_blocks(model, range(block if independent else 0, block + 1)))
    program = resolve(own, Request(recipe=recipe, allocation=allocation))
    phases = PhaseRecorder(own.model.device)
    run = begin(program, own, every, phases=phases, executor=Serial().executor, statistics=statistics)
    decoder = run.decoder
    solved = [decoder.name(block, target.path) for target in run.blocks[block].targets]
    if name not in solved:
        raise InputError(
            f"the recipe {recipe.name} states no problem at {name}: in this block it prunes "
            f"{', '.join(solved) or 'no single layer'}"
        )
    with calibrating(decoder):
        for index in range(block):
            if independent:
                with decoder.resident(index) as passed:
                    run.path.pass_by(passed, lambda: None)
            else:
                run.prune_block(index)
        return block_problem(decoder, run.task(block), path)


def place_of(decoder: Decoder, name: str) -> tuple[int, str]:
    """Return the block of a linear layer and its path there; InputError unless the model has a layer of that name."""
    places = {
        decoder.name(index, path): (index, path)
        for index in range(len(decoder.blocks))
        for path in decoder.paths(index)
    }
    if isinstance(name, str) and name in places:
        return places[name]
    modules = dict(decoder.model.named_modules())
    problem = (
        f"is a {type(modules[name]).__name__}"
        if isinstance(name, str) and modules.get(name) is not None
        else "is not in the model"
    )
    nearest = get_close_matches(str(name), places, n=3, cutoff=0.0)
    raise InputError(
        f"{shown(name)} {problem}, not a linear layer of a decoder block: the nearest names are {', '.join(nearest)}"
    )


def _visit(path: Path, block: nn.Module, original: nn.Module) -> Visit:
    """Return a visit of a block that is not pruned, with the original block if its weights differ."""
    return path.visit(block, original=block if _same(block, original) else original)


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two blocks hold the same numbers."""
    left, right = one.state_dict(), other.state_dict()
    return one is other or (
        left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
    )


def _check_same(now: Decoder, before: Decoder, block: int, path: str) -> None:
    """Raise InputError unless one model is a pruned version of the other that still has the layer's inputs."""
    if now.architecture.model_types != before.architecture.model_types or len(now.blocks) != len(before.blocks):
        kinds = [
            f"{decoder.architecture.model_type} of {counted(len(decoder.blocks), 'block')}" for decoder in (now, before)
        ]
        raise InputError(f"the model is a {kinds[0]} and `dense` a {kinds[1]}: give the same model before pruning")
    name, wanted = before.name(block, path), before.layer(block, path).in_features
    if path not in now.paths(block):
        raise InputError(f"{name} was removed from the model: give the model as it was before that")
    found = now.layer(block, path).in_features
    if found != wanted:
        raise InputError(
            f"{name} reads {found} inputs in the model and {wanted} in `dense`: give the model as it was before the "
            "layer's units were removed"
        )


def _with_own_blocks(model: PreTrainedModel, blocks: range) -> PreTrainedModel:
    """Return a copy of a model that shares all tensors except those of some blocks."""
    decoder = Decoder(model)
    own = {id(tensor) for index in blocks for tensor in _tensors(decoder.blocks[index])}
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model) if id(tensor) not in own})


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
