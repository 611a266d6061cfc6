"""Fenchel duality for penalised least squares: a lower bound on the optimum from any weight, however it was found."""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import OUTWARD, KnownMatrix, gamma
from optprune.penalties import NormPenalty, Penalty
from optprune.problems import PenalisedLeastSquares
from optprune.solvers.base import Certificate, Status
from optprune.solvers.verified import VerifiedLoss
from optprune.work import DOUBLE, inverse, product

HALVINGS = 50
"""the halvings of the interval in the search for the largest scale with a finite conjugate"""


@dataclass(frozen=True, eq=False)
class DualMap:
    r"""The shared data of a problem's bounds: the unpenalised minimiser V0, and Cholesky factors of A and S.

    For every T:  min_V f(V) + P(V)  >=  min_X (f(X) + <T, X>) - P*(T).

    The minimum over X is bounded by the gradient at a point near it, so rounding of the factors does no harm, and the
    rounding errors of float64 are subtracted (`VerifiedLoss.least`).

    Where A or S cannot be told from a singular matrix a ridge r s^2 is added, which changes f by at most a rounding of
    the size of an optimum. P(V) is no more than the objective of any weight, which bounds the size of an optimum
    (`Penalty.reach`). Without such a bound only zero is proved.
    """

    problem: PenalisedLeastSquares
    verified: VerifiedLoss
    """the loss, with a ridge where A or S is singular"""
    curvature: Float[Tensor, "out in"] | None
    """a diagonal that S (x) A exceeds; None where no ridge makes them regular"""
    factors: tuple[Float[Tensor, "out out"] | None, Float[Tensor, "in in"]] | None
    """Cholesky factors of S, where it is a matrix, and of A"""
    bend: float
    """twice the most that the ridge adds to f, relative to the squared size of V - W; 0 without a ridge"""
    minimiser: Float[Tensor, "out in"]
    """V0 - W, with V0 A = B as nearly as float64 tells"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares) -> "DualMap":
        """Return the dual map of a problem, in float64, by a few Cholesky factorisations."""
        verified, bend = _regular(VerifiedLoss.of(problem.loss))
        rows, columns = verified.floor_of_rows, verified.floor_of_columns
        curvature, factors, minimiser = None, None, torch.zeros_like(verified.weight)
        if rows is not None and columns is not None and math.isfinite(bend):
            curvature = torch.outer(rows, columns)
            outputs = None if verified.outputs is None else _factor(verified.outputs)
            factors = outputs, _factor(verified.inputs)
            if problem.loss.exact.pull is not None:
                minimiser = -torch.cholesky_solve(problem.loss.exact.pull.T, factors[1]).T
        return cls(problem, verified, curvature, factors, bend, minimiser)

    def bound(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the best lower bound from the gradient at a weight; at least 0, the least of loss and penalty."""
        change = weight.double() - self.verified.weight
        dual = self._alive(-self.verified.gradient(change)[0])
        level = self._level(weight)
        bounds = [self._scaled(change, dual, level), self._projected(change, dual, level)]
        return _largest(bounds)

    def bound_at(self, point: Float[Tensor, "out in"]) -> float | None:
        """Return the bound of any dual point T, brought into the domain of P*; None where that takes a ridge.

        f(X) + <T, X> is least at X = V0 - S^-1 T A^-1. A norm's domain is a ball, onto which T is projected; any other
        T is scaled down as far as it must be.
        """
        if self.curvature is None or self.bend:
            return None
        dual = self._alive(point.double())
        if isinstance(self.problem.penalty, NormPenalty):
            dual = dual - self.problem.penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        else:
            dual = dual * _largest_finite(self.problem.penalty, dual)
        return _largest([self._least(self.minimiser - self._inverse(dual), dual, math.inf)])

    def _level(self, weight: Tensor) -> float:
        """Return an upper bound of the optimum, which is needed where there is a ridge."""
        if not self.bend:
            return math.inf
        return self.problem.objective(weight) + self.problem.measuring_error(weight)

    def _scaled(self, change: Tensor, dual: Tensor, level: float) -> float:
        """Return the bound of T = s S (B - V A), the gradient at X = V0 + s (V - V0).

        The bound is a parabola in s where P is a norm, up to the scale at which P* becomes infinite; for other
        penalties s = 1 or the largest s below with a finite conjugate.
        """
        penalty = self.problem.penalty
        away = change - self.minimiser
        if isinstance(penalty, NormPenalty):
            slope = float((dual * (self.verified.weight + self.minimiser)).sum())
            curve = -float((dual * away).sum()) / 2
            norm = penalty.dual_norm(dual)
            limit = 1 / norm if norm > 0 else math.inf
            scale = min(max(slope / (2 * curve), 0.0), limit) if curve > 0 else (limit if slope > 0 else 0.0)
            scale = scale if scale < math.inf else 0.0
        else:
            scale = _largest_finite(penalty, dual)
        return self._least(self.minimiser + scale * away, scale * dual, level)

    def _projected(self, change: Tensor, dual: Tensor, level: float) -> float:
        """Return the bound of the proximal point T of P* at S (B - V A); by Moreau the rest E is that of P.

        f(X) + <T, X> is least at X = V + S^-1 E A^-1; being a minimum, its error is of second order in that of X.
        """
        cut = self.problem.penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        return self._least(change + self._inverse(cut), dual - cut, level)

    def _least(self, change: Tensor, dual: Tensor, level: float) -> float:
        """Return min_X f(X) + <T, X> - P*(T) from a change X - W near the minimum; T is moved into the domain of P*."""
        if self.curvature is None:
            return 0.0
        penalty, conjugate = self.problem.penalty, 0.0
        if isinstance(penalty, NormPenalty):
            # A norm's conjugate is zero within the unit ball of its dual, and infinite a rounding outside.
            norm = penalty.dual_norm(dual) * (1 + gamma(self.verified.terms))
            dual = dual / max(norm, 1.0)
        else:
            conjugate = penalty.conjugate(dual) * (1 + gamma(2 * self.verified.terms))
        least = self.verified.least(change, self.curvature, dual)
        return least - conjugate - OUTWARD * self.bend * self._spread(level) / 2

    def _spread(self, level: float) -> float:
        """Return the most that |V - W|^2 can be at an optimum, with entries in units of their output and input."""
        if not self.bend:
            return 0.0
        verified = self.verified
        rows = verified.rows.sqrt() if verified.outputs is None else verified.outputs.size
        size = torch.outer(rows, verified.inputs.size)
        return (self.problem.penalty.reach(level, size) + float(linalg.norm(verified.weight * size))) ** 2

    def _alive(self, dual: Tensor) -> Tensor:
        """Return T with zeros where the loss does not depend on the weight."""
        verified = self.verified
        rows = verified.rows > 0 if verified.outputs is None else verified.outputs.size > 0
        return dual.where(rows[:, None] & (verified.inputs.size > 0), 0.0)

    def _inverse(self, value: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return S^-1 X A^-1."""
        if self.factors is None:
            return torch.zeros_like(value)
        outputs, inputs = self.factors
        step = torch.cholesky_solve(value.T, inputs).T
        if outputs is not None:
            return torch.cholesky_solve(step, outputs)
        rows = self.verified.rows[:, None]
        return torch.where(rows > 0, step / torch.where(rows > 0, rows, 1.0), 0.0)


def _regular(verified: VerifiedLoss) -> tuple[VerifiedLoss, float]:
    """Return the loss with a ridge on A and S where they are singular, and `bend`."""
    inputs, outputs = verified.inputs, verified.outputs
    one = (inputs, 0.0) if verified.floor_of_columns is not None else inputs.regularised()
    other = (outputs, 0.0)
    if outputs is not None and verified.floor_of_rows is None:
        other = outputs.regularised()
    ridges = one[1], other[1]
    if ridges == (0.0, 0.0):
        return verified, 0.0
    sizes = [1.0 if known is None else float(linalg.norm(known.scaled)) for known in (inputs, outputs)]
    bend = ridges[0] * sizes[1] + ridges[1] * sizes[0] + ridges[0] * ridges[1]
    return replace(verified, inputs=one[0], outputs=other[0]), bend


def _factor(known: KnownMatrix) -> Float[Tensor, "n n"]:
    """Return a Cholesky factor, in the units of the matrix."""
    factor, _ = linalg.try_cholesky(known.scaled)
    return known.unit[:, None] * factor


def _largest(bounds: list[float]) -> float:
    """Return the largest of the bounds, or zero; bounds that are not finite do not count."""
    return max([0.0, *(bound for bound in bounds if bound < math.inf)])


def _largest_finite(penalty: Penalty, dual: Tensor) -> float:
    """Return the largest s <= 1 for which P*(s T) is finite: its domain is convex and contains 0."""
    if penalty.conjugate(dual) < math.inf:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if penalty.conjugate(middle * dual) < math.inf else (low, middle)
    return low


FIRST_CHECK = 10
GROWTH = 1.2
"""the factor between the steps of two checks: a check costs as much as a few steps"""
SAME = 8
"""measuring errors of an objective within which it and its bound count as equal"""
PATIENCE = 12
"""checks without a smaller gap after which the solver stops as stalled"""


@dataclass(frozen=True, eq=False)
class GapMonitor:
    """The best iterate and the best bound of all checks, which may come from different iterates."""

    dual: DualMap
    best: Float[Tensor, "out in"]
    objective: float
    bound: float
    gap: float
    """the relative gap between the two"""
    stale: int
    """checks since the last decrease of the gap"""
    next_check: int
    """the step of the next check"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares, start: Float[Tensor, "out in"]) -> "GapMonitor":
        """Return the gap at the start, in float64."""
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
    ) -> "GapMonitor":
        """Return the gap after a check of a weight, with the bound of a dual point, by default the gradient."""
        objective = problem.objective(weight)
        proved = None if point is None else self.dual.bound_at(point)
        bound = max(self.dual.bound(weight) if proved is None else proved, self.bound)
        better = objective < self.objective
        best = weight if better else self.best
        gap = _gap(problem, best, min(objective, self.objective), bound)
        improved = gap < 0.99 * self.gap
        # Where nothing can be proved (see DualMap) the objective must still fall.
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
        """Return the status at a tolerance, or None to continue."""
        if self.gap <= tolerance:
            return Status.CONVERGED
        return Status.STALLED if self.stale >= PATIENCE else None

    @property
    def certificate(self) -> Certificate:
        """The certificate of the best bound."""
        return Certificate(self.bound, "Fenchel duality")


@runtime_checkable
class Monitored(Protocol):
    """A state that holds the gap measured so far."""

    @property
    def monitor(self) -> GapMonitor:
        """The best iterate and bound so far."""
        ...


class StopsAtGap:
    """The stopping rule of solvers of penalised problems by the duality gap, a base class that precedes Solver."""

    accepts = (PenalisedLeastSquares,)

    tolerance: float
    """the relative gap at which the solver stops"""

    def promised_gap(self, problem: PenalisedLeastSquares) -> float | None:
        """Return the tolerance in float64 where A and S are damped; others may be too ill-conditioned for it."""
        loss = problem.loss
        damped = bool((loss.damping > 0).all()) and (loss.metric is None or bool((loss.metric.damping > 0).all()))
        return self.tolerance if loss.weight.dtype == torch.float64 and damped else None

    def monotone(self, problem: PenalisedLeastSquares) -> bool:
        """Return True: the start is among the measured weights."""
        return True

    def done(self, problem: PenalisedLeastSquares, state: Monitored) -> Status | None:
        """Return CONVERGED where the gap is met, STALLED where it no longer falls."""
        return state.monitor.status(self.tolerance)

    def value(self, problem: PenalisedLeastSquares, state: Monitored) -> Float[Tensor, "out in"]:
        """Return the best iterate of all checks."""
        return state.monitor.best

    def certify(self, problem: PenalisedLeastSquares, state: Monitored) -> Certificate | None:
        """Return the best bound of all checks."""
        return state.monitor.certificate


def gap_flops(outputs: int, inputs: int, steps: float, *, coupled: bool = False) -> float:
    """Return the flops of the dual map and of the checks of so many steps: an objective and two bounds each."""
    even = min(steps, FIRST_CHECK / (GROWTH - 1))
    checks = 1 + even / FIRST_CHECK + math.log(steps / even, GROWTH)
    check = 10 * DOUBLE * product(outputs, inputs, inputs)
    once = 2 * inverse(inputs)
    if coupled:
        check += 10 * DOUBLE * product(outputs, outputs, inputs)
        once += 2 * inverse(outputs)
    return once + checks * check


def _gap(problem: PenalisedLeastSquares, weight: Tensor, objective: float, bound: float) -> float:
    """Return (objective - bound) / |objective|, or 0 where the two are equal within the rounding of float64.

    Return infinity for a bound above the objective by more than that, which proves nothing.
    """
    known = SAME * problem.measuring_error(weight)
    if bound > objective + known:
        return math.inf
    return (objective - bound) / abs(objective) if objective - bound > known else 0.0
