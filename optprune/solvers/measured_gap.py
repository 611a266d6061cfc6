"""The duality gap of an iterative solver of penalised problems: measured now and then, and kept at its best."""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.penalties import NormPenalty
from optprune.problems import PenalisedLeastSquares
from optprune.solvers.duality import DualMap
from optprune.solvers.solution import Certificate, Status
from optprune.work import DOUBLE, inverse, product

FIRST_CHECK = 10
GROWTH = 1.2
"""a check costs a few steps, so checks lie further and further apart"""
SAME = 8
"""errors of measuring an objective within which it and its bound, which is less by a few of them, are the same"""
PATIENCE = 12
"""checks without a smaller gap after which the precision is exhausted"""


@dataclass(frozen=True, eq=False)
class MeasuredGap:
    """The best iterate and the best bound seen at a check, which may come from different iterates."""

    dual: DualMap
    best: Float[Tensor, "out in"]
    objective: float
    bound: float
    gap: float
    """the relative gap between the two"""
    stale: int
    """checks since the gap last became smaller"""
    next_check: int
    """the step at which it is measured again"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares, start: Float[Tensor, "out in"]) -> "MeasuredGap":
        """At the start, in float64."""
        dual = DualMap.of(problem)
        objective, bound = problem.objective(start), dual.bound(start)
        return cls(dual, start, objective, bound, _gap(problem, start, objective, bound), 0, FIRST_CHECK)

    def after(
        self,
        problem: PenalisedLeastSquares,
        weight: Float[Tensor, "out in"],
        steps: int,
        tolerance: float,
        point: Float[Tensor, "out in"] | None = None,
    ) -> "MeasuredGap":
        """After so many steps, at a weight, and with the bound that a dual point proves, by default the gradient."""
        objective = problem.objective(weight)
        proved = None if point is None else self.dual.bound_at(point)
        bound = max(self.dual.bound(weight) if proved is None else proved, self.bound)
        better = objective < self.objective
        best = weight if better else self.best
        gap = _gap(problem, best, min(objective, self.objective), bound)
        improved = gap < 0.99 * self.gap
        # Where nothing can be proved (see DualMap) it is the objective that must still fall.
        improved |= self.objective - objective > tolerance * abs(objective)
        return replace(
            self,
            best=best,
            objective=objective if better else self.objective,
            bound=bound,
            gap=gap,
            stale=0 if improved else self.stale + 1,
            next_check=max(steps + FIRST_CHECK, math.ceil(GROWTH * steps)),
        )

    def status(self, tolerance: float) -> Status | None:
        """None to go on."""
        if self.gap <= tolerance:
            return Status.CONVERGED
        return Status.STALLED if self.stale >= PATIENCE else None

    @property
    def certificate(self) -> Certificate:
        """The bound."""
        return Certificate(self.bound, "Fenchel duality")


@runtime_checkable
class Measuring(Protocol):
    """A state that holds what was measured on the way to it."""

    @property
    def measured(self) -> MeasuredGap:
        """The best iterate and bound so far."""
        ...


class StopsAtGap:
    """What solvers of penalised problems share whose states hold the gap: for their bases, before Solver."""

    accepts = (PenalisedLeastSquares,)

    tolerance: float
    """the relative gap at which it stops"""

    def promised_gap(self, problem: PenalisedLeastSquares) -> float | None:
        """The tolerance, in float64, but for a penalty that is free somewhere on an undamped, so maybe singular, A."""
        loss, penalty = problem.loss, problem.penalty
        free = isinstance(penalty, NormPenalty) and math.isinf(penalty.dual_norm(torch.ones_like(loss.weight)))
        damped = bool((loss.damping > 0).all()) and (loss.metric is None or bool((loss.metric.damping > 0).all()))
        if loss.weight.dtype != torch.float64 or (free and not damped):
            return None
        return self.tolerance

    def monotone(self, problem: PenalisedLeastSquares) -> bool:
        """The start is among what is measured."""
        return True

    def done(self, problem: PenalisedLeastSquares, state: Measuring) -> Status | None:
        """Why to stop: the gap is met, or no longer becomes smaller."""
        return state.measured.status(self.tolerance)

    def value(self, problem: PenalisedLeastSquares, state: Measuring) -> Float[Tensor, "out in"]:
        """The best iterate seen at a check."""
        return state.measured.best

    def certify(self, problem: PenalisedLeastSquares, state: Measuring) -> Certificate | None:
        """The best bound seen at a check."""
        return state.measured.certificate


def gap_flops(outputs: int, inputs: int, steps: float, *, coupled: bool = False) -> float:
    """Return the flops of the dual map, and of measuring the gap on so many steps: an objective and two bounds each."""
    even = min(steps, FIRST_CHECK / (GROWTH - 1))
    checks = 1 + even / FIRST_CHECK + math.log(steps / even, GROWTH)
    check = 10 * DOUBLE * product(outputs, inputs, inputs)
    once = 2 * inverse(inputs)
    if coupled:
        check += 10 * DOUBLE * product(outputs, outputs, inputs)
        once += 2 * inverse(outputs)
    return once + checks * check


def _gap(problem: PenalisedLeastSquares, weight: Tensor, objective: float, bound: float) -> float:
    """(objective - bound) / |objective|; 0 where float64 does not tell them apart, though the bound is lower.

    A bound above the objective by more than that proves nothing: infinity.
    """
    known = SAME * problem.measuring_error(weight)
    if bound > objective + known:
        return math.inf
    return (objective - bound) / abs(objective) if objective - bound > known else 0.0
