"""Descents: solvers of block matching, and the one driver, in which tokens that no step sees decide what is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from optprune.numerics.precision import full_precision
from optprune.problems.matching import BlockMatching, Examples, Point
from optprune.solvers.solution import Status

State = TypeVar("State")
PATIENCE = 3
"""looks at the held-out examples, without a smaller error there, after which a descent ends"""


class Descent(ABC, Generic[State]):
    """An algorithm that moves a block's parameters by gradients; concrete ones are frozen dataclasses of options.

    `match` drives it: begin once, then step until done says why to stop. Steps keep zeros outside the support.
    """

    @abstractmethod
    def begin(self, problem: BlockMatching, start: Point) -> State:
        """The state before the first step; the tensors of the start become the state's own."""

    @abstractmethod
    def step(self, problem: BlockMatching, state: State) -> State:
        """The state after one more step."""

    @abstractmethod
    def done(self, problem: BlockMatching, state: State) -> Status | None:
        """None to go on, else why to stop."""

    @abstractmethod
    def point(self, state: State) -> Point:
        """The parameters that the state stands for; a later step may change their tensors."""

    def back(self, problem: BlockMatching, state: State, best: Point) -> State:
        """The state from which to go on after a look that found no smaller error than at the point kept."""
        return state

    @abstractmethod
    def looks(self, problem: BlockMatching) -> int:
        """After how many steps the held-out examples are looked at again."""


@dataclass(frozen=True, eq=False)
class Matched:
    """Parameters and what the problem measured of them: errors are relative, by token."""

    value: Point
    error_before: float
    error: float
    held_out_before: float
    held_out: float
    steps: int
    """the steps that led to the value: 0 where it is the start"""
    tried: int
    """all steps that were made"""
    status: Status


@torch.no_grad()
@full_precision()
def match(
    problem: BlockMatching,
    solver: Descent[State],
    apart: Examples | None = None,
    *,
    rounded: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Matched:
    """Solve a block matching problem.

    Of what the descent comes by, at the looks that the solver asks for, the value is what has the least error on the
    examples kept `apart`, the start among it; after a look without a smaller one the solver may go back, and after
    three in a row it ends. Where none are kept apart the objective decides, twice which then stands for that error.
    Points are tried as they are `rounded`, and a weight that this would make zero is what it was at first.
    """
    judge: Callable[[Point], float] = problem.on(apart).error if apart is not None else _twice(problem.objective)
    best, best_step = problem.anchor, 0
    before, held_out_before = problem.error(best), judge(best)
    state, steps, held_out, misses = solver.begin(problem, problem.start()), 0, held_out_before, 0
    every = solver.looks(problem)
    while (status := solver.done(problem, state)) is None:
        state, steps = solver.step(problem, state), steps + 1
        if steps % every and solver.done(problem, state) is None:
            continue
        tried = _rounded(problem, solver.point(state), rounded)
        error, misses = judge(tried), misses + 1
        if error < held_out:
            best = _copied(tried, best if best_step else problem.start())
            best_step, held_out, misses = steps, error, 0
        elif misses >= PATIENCE:
            status = Status.CONVERGED
            break
        else:
            state = solver.back(problem, state, best)
    after = problem.error(best) if best_step else before
    return Matched(best, before, after, held_out_before, held_out, best_step, steps, status)


def _twice(measure: Callable[[Point], float]) -> Callable[[Point], float]:
    return lambda point: 2 * measure(point)


def _copied(point: Point, kept: Point) -> Point:
    """A point in the memory of the one that was kept before."""
    for weight, place in zip(point, kept, strict=True):
        place.copy_(weight)
    return kept


def _rounded(problem: BlockMatching, point: Point, rounded: Callable[[Tensor], Tensor]) -> Point:
    found = list[Tensor]()
    for weight, anchor in zip(point, problem.anchor, strict=True):
        near = rounded(weight).to(weight)
        found.append(near if near is weight else near.where((near != 0) | (weight == 0), anchor))
    return tuple(found)
