"""Descents: solvers of block matching, and the one driver, in which tokens that no step sees decide what is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from optprune.numerics.precision import full_precision
from optprune.problems.matching import BlockMatching, Examples, Point
from optprune.solvers.base import Status
from optprune.work import Work

State = TypeVar("State")
Rounding = Callable[[Tensor], Tensor]
"""weights as they will be stored"""
PATIENCE = 3
"""looks at the held-out examples, without a smaller error there, after which a descent ends"""
GRADIENT_PASSES = 4.0
"""the forward passes in whose time a gradient is found: one, and three for the way back, as a rule of thumb"""
NUMBER = 4
"""the bytes of a kept weight, which is float32 at least"""


class Descent(ABC, Generic[State]):
    """An algorithm that moves a block's parameters by gradients; concrete ones are frozen dataclasses of options.

    `match` drives it: begin once, then step until done says why to stop. After each of them the block of the problem
    holds the point that the state stands for.
    """

    @abstractmethod
    def begin(self, problem: BlockMatching) -> State:
        """The state before the first step, at the point that the block holds."""

    @abstractmethod
    def step(self, problem: BlockMatching, state: State) -> State:
        """The state after one more step."""

    @abstractmethod
    def done(self, problem: BlockMatching, state: State) -> Status | None:
        """None to go on, else why to stop."""

    def back(self, problem: BlockMatching, state: State, best: Point) -> State:
        """The state from which to go on after a look that found no smaller error than at the point kept.

        The tensors of that point are not the state's: later looks write into them.
        """
        return state

    @abstractmethod
    def looks(self, problem: BlockMatching) -> int:
        """After how many steps the held-out examples are looked at again."""

    @abstractmethod
    def work(self, weights: int, draws: int = 1) -> Work:
        """Return the work on a block of so many kept weights, its examples gone through in so many draws.

        The bytes are those of the solver's own vectors, beside the weights and their gradient. Looks at held-out
        examples come on top.
        """


@dataclass(frozen=True, eq=False)
class Matched:
    """Kept entries of a block, and what the problem measured of them: errors are relative, by token."""

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
    rounded: Rounding | None = None,
) -> Matched:
    """Solve a block matching problem: its block holds the value afterwards, whatever comes between.

    Of what the descent comes by, at the looks that the solver asks for, the value is what has the least error on the
    examples kept `apart`, the start among it; after a look without a smaller one the solver may go back, and after
    three in a row it ends. Where none are kept apart the objective decides, twice which then stands for that error.
    Points are tried as they are `rounded`, and a weight that this would make zero is what it was when last kept.
    """
    judge: Callable[[], float] = problem.on(apart).error if apart is not None else lambda: 2 * problem.objective()
    best, best_step = problem.point(), 0
    try:
        before, held_out_before = problem.error(), judge()
        state, steps, held_out, misses = solver.begin(problem), 0, held_out_before, 0
        every = solver.looks(problem)
        while (status := solver.done(problem, state)) is None:
            state, steps = solver.step(problem, state), steps + 1
            if steps % every and solver.done(problem, state) is None:
                continue
            with _as_rounded(problem, rounded, best):
                error, misses = judge(), misses + 1
                if error < held_out:
                    problem.point(into=best)
                    best_step, held_out, misses = steps, error, 0
            if misses >= PATIENCE:
                status = Status.CONVERGED
                break
            if misses:
                state = solver.back(problem, state, best)
    finally:
        problem.put(best)
    after = problem.error() if best_step else before
    return Matched(best, before, after, held_out_before, held_out, best_step, steps, status)


@contextmanager
def _as_rounded(problem: BlockMatching, rounded: Rounding | None, kept: Point) -> Generator[None, None, None]:
    """The block holds its point as it is rounded meanwhile."""
    if rounded is None:
        yield
        return
    own, near = problem.point(), list[Tensor]()
    for values, others in zip(own, kept, strict=True):
        new = rounded(values).to(values)
        near.append(new.where((new != 0) | (values == 0), others))
    problem.put(tuple(near))
    yield
    problem.put(own)
