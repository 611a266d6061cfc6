"""Fenchel duality for penalised least squares: a lower bound on the optimum from any weight, however it was found."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.penalties import NormPenalty
from optprune.problems import LayerLoss, PenalisedLeastSquares


@dataclass(frozen=True, eq=False)
class DualMap:
    r"""What the bounds of one problem share: the unpenalised minimiser V0 and, where it exists, a Cholesky factor of A.

    For every T:  min_V f(V) + P(V)  >=  -f*(-T) - P*(T)  =  min_X (f(X) + <T, X>) - P*(T).
    """

    penalty: NormPenalty | object
    loss: LayerLoss
    gram: Float[Tensor, "in in"]
    factor: Float[Tensor, "in in"] | None
    minimiser: Float[Tensor, "out in"] | None
    """V0 with V0 A = B; None where A is singular and B is not known to be in its range"""
    least: float
    """f(V0)"""

    @classmethod
    def of(cls, problem: PenalisedLeastSquares) -> "DualMap":
        """In float64, with one Cholesky factorisation."""
        loss = problem.loss
        gram = loss.gram.double()
        factor, failed = torch.linalg.cholesky_ex(gram)
        usable = None if bool(failed) else factor
        minimiser: Tensor | None = loss.weight.double()
        if loss.pull is not None:
            shift = None if usable is None else torch.cholesky_solve(loss.pull.double().T, usable).T
            minimiser = None if shift is None else minimiser - shift
        least = 0.0 if minimiser is None else loss.value(minimiser)
        return cls(problem.penalty, loss, gram, usable, minimiser, least)

    def bound(self, weight: Float[Tensor, "out in"]) -> float:
        """The best lower bound that the gradient at a weight gives."""
        exact = weight.double()
        loss, penalty = self.loss, self.penalty
        gradient = (exact - loss.weight.double()) @ self.gram
        dual = -(gradient if loss.pull is None else gradient + loss.pull.double())
        # The loss is nonnegative and so is every penalty.
        bounds = [0.0]
        if isinstance(penalty, NormPenalty):
            if self.minimiser is not None:
                bounds.append(self._scaled(exact, dual, penalty))
            if self.factor is not None:
                bounds.append(self._projected(exact, dual, penalty))
        elif self.minimiser is not None or loss.pull is None:
            bounds.append(loss.value(exact) + float((dual * exact).sum()) - penalty.conjugate(dual))
        return max(bounds)

    def _scaled(self, weight: Tensor, dual: Tensor, penalty: NormPenalty) -> float:
        """T = s (B - V A), the gradient at X = V0 + s (V - V0), with the best s for which P*(T) = 0.

        The bound is f(V0) + s <B - V A, V0> - s^2 (f(V) - f(V0)), a parabola in s.
        """
        assert self.minimiser is not None
        slope = float((dual * self.minimiser).sum())
        curve = max(self.loss.value(weight) - self.least, 0.0)
        norm = penalty.dual_norm(dual)
        limit = 1 / norm if norm > 0 else float("inf")
        scale = min(max(slope / (2 * curve), 0.0), limit) if curve > 0 else (limit if slope > 0 else 0.0)
        if scale == float("inf"):
            scale = 0.0
        return self.least + scale * slope - scale * scale * curve

    def _projected(self, weight: Tensor, dual: Tensor, penalty: NormPenalty) -> float:
        """T = the projection of B - V A onto the dual ball, by Moreau: what is cut off, E, is a proximal operator.

        f(X) + <T, X> is least at X = V + E A^-1; being a minimum, its error is of second order in that of X.
        """
        assert self.factor is not None
        cut = penalty.prox(dual, torch.ones((), dtype=dual.dtype, device=dual.device))
        nearest = weight + torch.cholesky_solve(cut.T, self.factor).T
        return self.loss.value(nearest) + float(((dual - cut) * nearest).sum())
