"""Fenchel duality for penalised least squares: a lower bound on the optimum from any weight, however it was found."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import OUTWARD, KnownMatrix, gamma
from optprune.penalties import NormPenalty, Penalty
from optprune.problems import PenalisedLeastSquares
from optprune.solvers.verified import VerifiedLoss

HALVINGS = 50
"""how often the interval is halved in which the largest scale with a finite conjugate is looked for"""


@dataclass(frozen=True, eq=False)
class DualMap:
    r"""What the bounds of one problem share: the unpenalised minimiser V0, and Cholesky factors of A and S.

    For every T:  min_V f(V) + P(V)  >=  min_X (f(X) + <T, X>) - P*(T).

    The minimum over X is bounded at a point near it by what is left of the gradient there, so that no rounding of the
    factors matters, and everything that float64 rounds is taken off (`VerifiedLoss.least`).

    Where A or S cannot be told from a singular matrix a ridge r s^2 is added, which changes f by at most a rounding of
    the size of an optimum: P(V) is no more than the objective of any weight, which says how large an optimum can be
    (`Penalty.reach`). Nothing but zero is proved of a penalty that says nothing of that.
    """

    problem: PenalisedLeastSquares
    verified: VerifiedLoss
    """the loss, with a ridge where A or S is singular"""
    curvature: Float[Tensor, "out in"] | None
    """a diagonal that S (x) A exceeds; None where no ridge makes them regular"""
    factors: tuple[Float[Tensor, "out out"] | None, Float[Tensor, "in in"]] | None
    """Cholesky factors of S, where it is a matrix, and of A"""
    bend: float
    """twice what the ridge adds to f at most, as a share of the squared size of V - W; 0 without a ridge"""
    minimiser: Float[Tensor, "out in"]
    """V0 - W, with V0 A = B as nearly as float64 tells"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares) -> "DualMap":
        """In float64, with a few Cholesky factorisations."""
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
        """The best lower bound that the gradient at a weight gives: 0 at least, as neither loss nor penalty is less."""
        change = weight.double() - self.verified.weight
        dual = self._alive(-self.verified.gradient(change)[0])
        level = self._level(weight)
        bounds = [self._scaled(change, dual, level), self._projected(change, dual, level)]
        return _largest(bounds)

    def bound_at(self, point: Float[Tensor, "out in"]) -> float | None:
        """The bound of any dual point T, brought into the domain of P*; None where that takes a ridge.

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
        """An upper bound of the optimum; it is needed where there is a ridge."""
        if not self.bend:
            return math.inf
        return self.problem.objective(weight) + self.problem.measuring_error(weight)

    def _scaled(self, change: Tensor, dual: Tensor, level: float) -> float:
        """T = s S (B - V A), the gradient at X = V0 + s (V - V0).

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
        """T = the proximal point of P* at S (B - V A), by Moreau: what is cut off, E, is the proximal point of P.

        f(X) + <T, X> is least at X = V + S^-1 E A^-1; being a minimum, its error is of second order in that of X.
        """
        cut = self.problem.penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        return self._least(change + self._inverse(cut), dual - cut, level)

    def _least(self, change: Tensor, dual: Tensor, level: float) -> float:
        """min f(X) + <T, X> - P*(T), at a change X - W near the least, for a T brought into the domain of P*."""
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
        """The most that |V - W|^2 can be at an optimum, every entry in units of its output and its input."""
        if not self.bend:
            return 0.0
        verified = self.verified
        rows = verified.rows.sqrt() if verified.outputs is None else verified.outputs.size
        size = torch.outer(rows, verified.inputs.size)
        return (self.problem.penalty.reach(level, size) + float(linalg.norm(verified.weight * size))) ** 2

    def _alive(self, dual: Tensor) -> Tensor:
        """T, zero where neither loss nor its gradient depends on the weight."""
        verified = self.verified
        rows = verified.rows > 0 if verified.outputs is None else verified.outputs.size > 0
        return dual.where(rows[:, None] & (verified.inputs.size > 0), 0.0)

    def _inverse(self, value: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """S^-1 X A^-1."""
        if self.factors is None:
            return torch.zeros_like(value)
        outputs, inputs = self.factors
        step = torch.cholesky_solve(value.T, inputs).T
        if outputs is not None:
            return torch.cholesky_solve(step, outputs)
        rows = self.verified.rows[:, None]
        return torch.where(rows > 0, step / torch.where(rows > 0, rows, 1.0), 0.0)


def _regular(verified: VerifiedLoss) -> tuple[VerifiedLoss, float]:
    """The loss with a ridge on A, and on S, where they are singular, and `bend`."""
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
    """A Cholesky factor, in the units of the matrix."""
    factor, _ = linalg.try_cholesky(known.scaled)
    return known.unit[:, None] * factor


def _largest(bounds: list[float]) -> float:
    """The largest of some bounds, or zero; what is not finite is no proof."""
    return max([0.0, *(bound for bound in bounds if bound < math.inf)])


def _largest_finite(penalty: Penalty, dual: Tensor) -> float:
    """The largest s <= 1 for which P*(s T) is finite: its domain is convex and holds 0."""
    if penalty.conjugate(dual) < math.inf:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if penalty.conjugate(middle * dual) < math.inf else (low, middle)
    return low
