"""Fenchel duality for penalised least squares: a lower bound on the optimum from any weight, however it was found."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.penalties import NormPenalty, Penalty
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers.restore import only_rounding
from optprune.solvers.spectrum import ScaledGram, column_scale, exceeds, factor_rounding

HALVINGS = 50
"""how often the interval is halved in which the largest scale with a finite conjugate is looked for"""


@dataclass(frozen=True, eq=False)
class DualMap:
    r"""What the bounds of one problem share: the unpenalised minimiser V0, and Cholesky factors of a regular A and S.

    For every T:  min_V f(V) + P(V)  >=  -f*(-T) - P*(T)  =  min_X (f(X) + <T, X>) - P*(T).

    Where A or S is singular, only a T in its range gives more than nothing. Multiples of S (B - V A) are, so there is
    a bound for every penalty that is positive away from zero; one that leaves a weight free may get no better one than
    zero.
    """

    penalty: Penalty
    loss: LayerLoss
    factor: Float[Tensor, "in in"] | None
    row_factor: Float[Tensor, "out out"] | None
    """the Cholesky factor of S, where there is a metric and it is regular"""
    minimiser: Float[Tensor, "out in"]
    """V0 with V0 A = B"""
    least: float
    """f(V0), or 0 where V0 A is not B up to rounding: then f(V0) is no minimum"""
    attained: bool
    """whether V0 A = B up to rounding, without which V0 proves nothing"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares) -> "DualMap":
        """In float64, with two Cholesky factorisations."""
        loss = problem.loss
        scaled = ScaledGram.of(loss)
        factor = scaled.factor()
        # In the units of A again: those of a Cholesky factor are those of its rows.
        factor = None if factor is None else scaled.scale[:, None] * factor
        row_factor = None
        if loss.metric is not None:
            rounding = len(loss.weight) * torch.finfo(loss.gram.dtype).eps
            row_factor = _regular_factor(loss.metric.matrix.double(), loss.metric.damping, rounding)
        minimiser = loss.weight.double()
        if loss.pull is not None:
            pull = loss.exact_residual(minimiser)
            if factor is None:
                step = scaled.solve_singular(scaled.matrix, pull / scaled.scale) / scaled.scale
            else:
                step = torch.cholesky_solve(pull.T, factor).T
            minimiser = minimiser - step
        attained = factor is not None or only_rounding(loss, minimiser, loss.exact_residual(minimiser))
        least = loss.exact_value(minimiser) if attained else 0.0
        return cls(problem.penalty, loss, factor, row_factor, minimiser, least, attained)

    def bound(self, weight: Float[Tensor, "out in"]) -> float:
        """The best lower bound that the gradient at a weight gives."""
        exact = weight.double()
        dual = -self.loss.exact_gradient(exact)
        # The loss is nonnegative and so is every penalty.
        bounds = [0.0]
        if self.attained:
            bounds.append(self._scaled(exact, dual))
        if self.factor is not None and (self.loss.metric is None or self.row_factor is not None):
            bounds.append(self._projected(exact, dual))
        # A comparison with NaN, from an infinite weight, is not a proof.
        return max((bound for bound in bounds if bound < math.inf), default=0.0)

    def _scaled(self, weight: Tensor, dual: Tensor) -> float:
        """T = s S (B - V A), the gradient at X = V0 + s (V - V0).

        The bound is f(V0) + s <S (B - V A), V0> - s^2 (f(V) - f(V0)) - P*(T); for a norm a parabola in s up to the
        scale at which P* becomes infinite, for other penalties s = 1 or the largest s below with a finite conjugate.
        """
        slope = float((dual * self.minimiser).sum())
        curve = max(self.loss.exact_value(weight) - self.least, 0.0)
        penalty = self.penalty
        if isinstance(penalty, NormPenalty):
            norm = penalty.dual_norm(dual)
            limit = 1 / norm if norm > 0 else math.inf
            scale = min(max(slope / (2 * curve), 0.0), limit) if curve > 0 else (limit if slope > 0 else 0.0)
            scale, conjugate = (scale, 0.0) if scale < math.inf else (0.0, 0.0)
        else:
            scale = _largest_finite(penalty, dual)
            conjugate = penalty.conjugate(scale * dual)
        return self.least + scale * slope - scale * scale * curve - conjugate

    def _projected(self, weight: Tensor, dual: Tensor) -> float:
        """T = the proximal point of P* at S (B - V A), by Moreau: what is cut off, E, is the proximal point of P.

        f(X) + <T, X> is least at X = V + S^-1 E A^-1; being a minimum, its error is of second order in that of X.
        """
        assert self.factor is not None
        cut = self.penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        nearest = weight + self._inverse(cut)
        return self._least(nearest, dual - cut)

    def bound_at(self, point: Float[Tensor, "out in"]) -> float | None:
        """The bound of any dual point T, brought into the domain of P*; None where A or S is singular.

        f(X) + <T, X> is least at X = V0 - S^-1 T A^-1. A norm's domain is a ball, onto which T is projected; any other
        T is scaled down as far as it must be.
        """
        if self.factor is None or (self.loss.metric is not None and self.row_factor is None):
            return None
        dual = point.double()
        if isinstance(self.penalty, NormPenalty):
            dual = dual - self.penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        else:
            dual = dual * _largest_finite(self.penalty, dual)
        bound = self._least(self.minimiser - self._inverse(dual), dual)
        return max(bound, 0.0) if bound < math.inf else 0.0

    def _least(self, nearest: Tensor, dual: Tensor) -> float:
        """f(X) + <T, X> - P*(T) at the X that makes it least, for a T in the domain of P*."""
        # A norm's conjugate is zero there, where a point brought inside lies up to rounding.
        conjugate = 0.0 if isinstance(self.penalty, NormPenalty) else self.penalty.conjugate(dual)
        return self.loss.exact_value(nearest) + float((dual * nearest).sum()) - conjugate

    def _inverse(self, value: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """S^-1 X A^-1."""
        assert self.factor is not None
        step = torch.cholesky_solve(value.T, self.factor).T
        return step if self.row_factor is None else torch.cholesky_solve(step, self.row_factor)


def _regular_factor(
    matrix: Float[Tensor, "n n"], damping: Float[Tensor, " n"], rounding: float
) -> Float[Tensor, "n n"] | None:
    """The Cholesky factor, or None where the matrix is no better than singular."""
    scale = column_scale(matrix)
    unit = matrix / torch.outer(scale, scale)
    factor, failed = linalg.try_cholesky(unit)
    least = factor_rounding(len(unit), unit.dtype) + (0.0 if bool((damping > 0).all()) else rounding)
    # A factor of less than that would invert rounding, and claim a bound that is none.
    regular = not bool(failed) and bool(exceeds(unit, least))
    return scale[:, None] * factor if regular else None


def _largest_finite(penalty: Penalty, dual: Tensor) -> float:
    """The largest s <= 1 for which P*(s T) is finite: its domain is convex and holds 0."""
    if penalty.conjugate(dual) < math.inf:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if penalty.conjugate(middle * dual) < math.inf else (low, middle)
    return low
