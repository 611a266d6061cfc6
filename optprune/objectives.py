"""Objectives: functions from what is known of a layer to the problem to solve there."""

from collections.abc import Callable
from dataclasses import dataclass

from optprune.errors import InputError
from optprune.patterns import Pattern
from optprune.problems import LayerLoss, Link, LinkedLeastSquares, Problem, SparseLeastSquares


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What an objective may use to state a layer's problem."""

    name: str
    """the layer's full name, e.g. model.layers.3.mlp.down_proj"""
    block: int
    loss: LayerLoss
    """the loss over the layer's weight [out, in], damped as the recipe says"""
    keep: int
    """how many units (with a link) or weights (without) the budget leaves"""
    link: Link | None
    """the units that this layer shares with the layers before it, where the recipe prunes units: whatever the problem,
    those are removed of which its answer reads no input (`Problem.inputs`), equally many in every slot"""
    pattern: Pattern | None = None
    """the pattern that a mask of the layer must have, where the recipe prunes single weights"""


Objective = Callable[[LayerContext], Problem]


def linked(context: LayerContext) -> LinkedLeastSquares:
    """Keep the best `keep` units of a link: structured pruning."""
    if context.link is None:
        raise InputError(f"{context.name} has no units: the objective 'linked' needs units mlp, vo, kv-groups or all")
    return LinkedLeastSquares(context.loss, context.link, context.keep)


def sparse(context: LayerContext) -> SparseLeastSquares:
    """Keep the best weights under the recipe's pattern: unstructured, row-wise or N:M sparsity."""
    if context.pattern is None:
        raise InputError(f"{context.name} has no pattern of single weights: the objective 'sparse' needs units weights")
    return SparseLeastSquares(context.loss, context.pattern)


OBJECTIVES: dict[str, Objective] = {"linked": linked, "sparse": sparse}
