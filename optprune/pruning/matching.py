"""A block matched: the calls of the block as examples, and what became of its parameters."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.calibration.partial_sums import OrderedSum, TensorSums
from optprune.metric import OutputMetric
from optprune.problems import BlockMatching, Example, Examples
from optprune.problems.matching import Point, Terms, order
from optprune.recipe.groups import Matching
from optprune.report import RecoveredPart
from optprune.solvers import Adam, Descent, Lbfgs, match


@final
class Sequences(Examples):
    """The sequences of a block's calls, one an example. A draw has a few of every partial sum."""

    def __init__(self, calls: Calls, at_once: int) -> None:
        """A draw has `at_once` sequences of each partial sum, as long as there are any."""
        self.calls, self.partial_sums = calls, calls.share.partial_sums
        self._places: list[list[tuple[int, int]]] = [[] for _ in range(self.partial_sums.own)]
        """the call and the place in it of every sequence, by this process's partial sums"""
        for number, shape in enumerate(calls.targets.shapes):
            self._places[calls.part(number)] += [(number, place) for place in range(shape[0])]
        counts = [len(places) for places in self._places]
        most = max(max(every, default=0) for every in self.partial_sums.peers.all_gather(counts))
        self.at_once, self.draws = at_once, max(1, -(-most // at_once))

    def sums(self, terms: Terms, zeros: Callable[[], tuple[Tensor, ...]], draw: int | None = None) -> Point:
        sums = OrderedSum(self.partial_sums, lambda: TensorSums(*zeros()))
        for part, places in enumerate(self._places):
            for number, place in places if draw is None else self._drawn(places, draw):
                # The first before there is room for sums, none while the next is made: that needs room inside a block.
                found = terms(self._example(number, place))
                sums.at(part).add(*found)
                del found
        return sums.total().tensors

    def _drawn(self, places: list[tuple[int, int]], draw: int) -> list[tuple[int, int]]:
        epoch, turn = divmod(draw, self.draws)
        chosen = order(len(places), epoch)[turn * self.at_once : (turn + 1) * self.at_once]
        return [places[number] for number in chosen]

    def _example(self, number: int, place: int) -> Example:
        (args, kwargs), target = self.calls.arguments[number], self.calls.targets[number]
        size, rows = len(target), slice(place, place + 1)
        return Example(_rows(args, size, rows), _rows(kwargs, size, rows), target[rows])


def _rows(value: Any, size: int, rows: slice) -> Any:
    """Rows of a batch of a size in all that nested values hold of it; what all its sequences share stays whole."""
    if isinstance(value, Tensor):
        # Positions [length] are shared, whatever their number.
        return value[rows] if value.ndim > 1 and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: _rows(part, size, rows) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(part, size, rows) for part in value)
    return value


def descent_of(matching: Matching) -> Descent[Any]:
    """The solver that a recipe asks for."""
    return Lbfgs(matching.epochs) if matching.solver == "lbfgs" else Adam(matching.epochs, matching.rate)


def match_block(
    block: nn.Module,
    fit: Calls,
    apart: Calls,
    solver: Descent[Any],
    *,
    at_once: int = 1,
    pull: float = 0.0,
    metric: OutputMetric | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> RecoveredPart:
    """Move the parameters of a block in place, zeros of its matrices kept, so that it answers the targets.

    A draw of the solver has `at_once` sequences of each partial sum. The state with the least error on the calls kept
    apart stays, rounded to a `dtype` where weights will be stored in one of fewer digits than the block has: that error
    never rises. InputError where the block itself has too few.
    """
    began = time.perf_counter()
    problem = BlockMatching.of(block, Sequences(fit, at_once), metric, pull)
    rounded = None if dtype is None else partial(Tensor.to, dtype=dtype)
    found = match(problem, solver, Sequences(apart, at_once), rounded=rounded)
    return RecoveredPart(
        name=name,
        layers=problem.names,
        error_before=found.error_before,
        error_after=found.error,
        held_out_before=found.held_out_before,
        held_out_after=found.held_out,
        steps=found.steps,
        seconds=time.perf_counter() - began,
    )
