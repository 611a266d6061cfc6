"""Objectives: functions from the context of a layer to its problem."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optprune.errors import InputError, check_kind
from optprune.patterns import Pattern
from optprune.problems import Channels, LayerLoss, Problem, SparseLeastSquares, StructuredLeastSquares
from optprune.system.own_code import own_code


@dataclass(frozen=True, eq=False)
class LayerContext:
    """The data from which an objective states a layer's problem."""

    name: str
    """the layer's full name, e.g. model.layers.3.mlp.down_proj"""
    block: int
    loss: LayerLoss
    """the loss over the layer's weight [out, in], with the damping of the recipe"""
    keep: int
    """the number of units (with channels) or weights (without) that the budget leaves"""
    channels: Channels | None
    """the units that this layer shares with the layers before it, where the recipe prunes units; for every problem the
    units without an input in `Problem.inputs` of the answer are removed, equally many in every slot"""
    pattern: Pattern | None = None
    """the pattern that a mask of the layer must have, where the recipe prunes single weights"""


Objective = Callable[[LayerContext], Problem]


def linked(context: LayerContext) -> StructuredLeastSquares:
    """Keep the best `keep` units of a layer: structured pruning."""
    if context.channels is None:
        raise InputError(f"{context.name} has no units: the objective 'linked' needs units mlp, vo, kv-groups or all")
    return StructuredLeastSquares(context.loss, context.channels, context.keep)


def sparse(context: LayerContext) -> SparseLeastSquares:
    """Keep the best weights under the recipe's pattern: unstructured, row-wise or N:M sparsity."""
    if context.pattern is None:
        raise InputError(f"{context.name} has no pattern of single weights: the objective 'sparse' needs units weights")
    return SparseLeastSquares(context.loss, context.pattern)


OBJECTIVES: dict[str, Objective] = {"linked": linked, "sparse": sparse}


def stated(objective: Objective, context: LayerContext) -> Problem:
    """Return the problem of a layer.

    InputError where the objective returns none, or that of another layer, or writes into the weight; OwnCodeError where
    it fails.
    """
    weight = context.loss.weight
    before = None if weight.is_inference() else weight._version
    with own_code():
        problem = objective(context)
    if before is not None and weight._version != before:
        raise InputError(
            f"the objective writes into the weight of {context.name}, which changes the model: let it work on a copy, "
            "by clone()"
        )
    what = f"what the objective returns at {context.name}"
    check_kind(what, problem, Problem, "return a problem, e.g. MaskedLeastSquares(context.loss, mask)")
    _check_same_layer(what, problem.loss, context.loss)
    return problem


def _check_same_layer(what: str, loss: LayerLoss, own: LayerLoss) -> None:
    """Raise InputError unless a loss is one of the layer: it has the layer's moments or its weight, of like numbers."""
    weight, wanted = loss.weight, own.weight
    if (weight.shape, weight.dtype, weight.device) != (wanted.shape, wanted.dtype, wanted.device):
        raise InputError(
            f"{what} has a weight {list(weight.shape)} in {weight.dtype} on {weight.device}, but that of the layer is "
            f"{list(wanted.shape)} in {wanted.dtype} on {wanted.device}: state it with context.loss"
        )
    if loss.moments is not own.moments and weight is not wanted and not torch.equal(weight, wanted):
        raise InputError(f"{what} is the problem of another layer: state it with context.loss")
