"""Descents: solvers of block matching, and their driver, which selects the answer by held-out tokens."""

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
"""the rounding of weights to the dtype in which they will be stored"""
PATIENCE = 3
"""evaluations of the held-out examples without a smaller error after which a descent ends"""
GRADIENT_PASSES = 4.0
"""the time of a gradient in forward passes, as a rule of thumb: one forward, and three for the backward pass"""
NUMBER = 4
"""the bytes of a kept weight, which is float32 at least"""


class Descent(ABC, Generic[State]):
    """An algorithm that moves a block's parameters by gradients; concrete ones are frozen dataclasses of options.

    `match` calls begin once, then step until done returns a status. After each call the block of the problem
    holds the point of the state.
    """

    @abstractmethod
    def begin(self, problem: BlockMatching) -> State:
        """Return the state before the first step, at the point that the block holds."""

    @abstractmethod
    def step(self, problem: BlockMatching, state: State) -> State:
        """Return the state after one more step."""

    @abstractmethod
    def done(self, problem: BlockMatching, state: State) -> Status | None:
        """Return None to continue, or the reason to stop."""

    def restart(self, problem: BlockMatching, state: State, best: Point) -> State:
        """Return the state to continue from after an evaluation without a smaller held-out error than the best one.

        The state must not share the tensors of the best point: later evaluations write into them.
        """
        return state

    @abstractmethod
    def evaluate_every(self, problem: BlockMatching) -> int:
        """Return the number of steps between two evaluations of the held-out examples."""

    @abstractmethod
    def work(self, weights: int, draws: int = 1) -> Work:
        """Return the work on a block with `weights` kept weights, whose examples take `draws` draws.

        The bytes are those of the solver's own vectors, beside the weights and their gradient. Evaluations of held-out
        examples are not included.
        """


@dataclass(frozen=True, eq=False)
class Matched:
    """The fitted entries of a block, and the errors that the problem measured, relative and by token."""

    value: Point
    error_before: float
    error: float
    held_out_before: float
    held_out: float
    steps: int
    """the steps to the value; 0 where it is the start"""
    tried: int
    """all steps"""
    status: Status


@torch.no_grad()
@full_precision()
def match(
    problem: BlockMatching,
    solver: Descent[State],
    held_out_examples: Examples | None = None,
    *,
    rounded: Rounding | None = None,
) -> Matched:
    """Solve a block matching problem. Its block holds the value afterwards, also after an exception.

    The value is the point with the least error on the held-out examples among the evaluated points and the start.
    After an evaluation without a smaller error the solver may return to the best point, and after three in a row it
    ends. Without held-out examples twice the objective takes the place of that error. Points are evaluated after
    `rounded`, and a weight that it would set to zero keeps its value of the best point.
    """
    judge: Callable[[], float] = lambda: 2 * problem.objective()  # noqa: E731
    if held_out_examples is not None:
        judge = problem.on(held_out_examples).error
    best, best_step = problem.point(), 0
    try:
        before, held_out_before = problem.error(), judge()
        state, steps, held_out, misses = solver.begin(problem), 0, held_out_before, 0
        every = solver.evaluate_every(problem)
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
                state = solver.restart(problem, state, best)
    finally:
        problem.put(best)
    after = problem.error() if best_step else before
    return Matched(best, before, after, held_out_before, held_out, best_step, steps, status)


@contextmanager
def _as_rounded(problem: BlockMatching, rounded: Rounding | None, kept: Point) -> Generator[None, None, None]:
    """Round the block's point within the context, and restore it afterwards."""
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
