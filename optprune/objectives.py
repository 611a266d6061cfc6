"""Objectives: functions from what is known of a layer to the problem to solve there."""

from collections.abc import Callable
from dataclasses import dataclass

from optprune.errors import InputError
from optprune.problems import LayerLoss, Link, LinkedLeastSquares, Problem


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What an objective may use to state a layer's problem."""

    name: str
    """the layer's full name, e.g. model.layers.3.mlp.down_proj"""
    block: int
    loss: LayerLoss
    """over the layer's weight [out, in], damped as the recipe says"""
    keep: int
    """how many units (with a link) or weights (without) the budget leaves"""
    link: Link | None
    """the units that this layer shares with the layers before it, where the recipe prunes units"""


Objective = Callable[[LayerContext], Problem]


def linked(context: LayerContext) -> LinkedLeastSquares:
    """Keep the best `keep` units of a link: structured pruning."""
    if context.link is None:
        raise InputError(f"{context.name} has no units: the objective 'linked' needs units mlp, vo or all")
    return LinkedLeastSquares(context.loss, context.link, context.keep)


OBJECTIVES: dict[str, Objective] = {"linked": linked}
