"""A layer's loss with proven bounds of its rounding errors, the base of every certificate.

The loss is the exact function of the stored numbers (weights, covariances, means, damping, metric), which
objectives measure in float64. Where the stored covariance is not exactly positive semidefinite, objectives count a
negative error as zero, so a bound on the quadratic holds for them too.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import OUTWARD, UNIT, KnownMatrix, gamma
from optprune.problems import LayerLoss
from optprune.problems.exact import absolute_product


@dataclass(frozen=True, eq=False)
class VerifiedLoss:
    r"""f(W + Z) = 1/2 <Z, S (Z A + P)> + 1/2 <Z, S P> + e/2, with P = W A - B and e = E|W (x* - x)|^2_S.

    The change Z is exact in float64; only the arithmetic on it rounds.
    """

    loss: LayerLoss
    inputs: KnownMatrix
    """A"""
    outputs: KnownMatrix | None
    """S where it is a matrix"""

    @classmethod
    def of(cls, loss: LayerLoss) -> "VerifiedLoss":
        """Return the verified loss, with A and a full S in float64."""
        moments, metric = loss.exact.moments, loss.metric
        outputs = None
        if metric is not None and metric.full:
            outputs = KnownMatrix.of(metric.average, metric.damping)
        return cls(loss, KnownMatrix.of(moments.covariance, loss.damping, moments.mean), outputs)

    @cached_property
    def weight(self) -> Float[Tensor, "out in"]:
        """W in float64."""
        return self.loss.weight.double()

    @cached_property
    def rows(self) -> Float[Tensor, " out"]:
        """The diagonal of S in float64, ones where there is no metric."""
        metric = self.loss.metric
        if metric is None:
            return torch.ones_like(self.weight[:, 0])
        average = metric.average.double()
        return (average.diagonal() if metric.full else average) + metric.damping.double()

    @cached_property
    def terms(self) -> int:
        """The most additions that a term of a sum over the weight passes through."""
        return sum(self.weight.shape) + 8

    @cached_property
    def linear_term(self) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """S P and its error."""
        if self.loss.exact.pull is None:
            return torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        return self.gradient(torch.zeros_like(self.weight))

    @cached_property
    def floor_of_rows(self) -> Float[Tensor, " out"] | None:
        """A nonnegative s with S >= diag(s), zero only for outputs without cost; None where no such s is proved."""
        if self.outputs is None:
            return (1 - 4 * UNIT) * self.rows
        assert self.loss.metric is not None
        return self.outputs.floor(self.loss.metric.damping)

    @cached_property
    def floor_of_columns(self) -> Float[Tensor, " in"] | None:
        """A positive d with A >= diag(d); None where no such d is proved."""
        return self.inputs.floor(self.loss.damping)

    @cached_property
    def constant(self) -> float:
        """A lower bound of e."""
        loss = self.loss.exact
        return loss.error_at_weight - loss.measuring_error(loss.weight)

    def residual(self, change: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
        """Return Z A + P and e [out]: entry oj has an error of at most e_o s_j, s^2 the diagonal of A."""
        inputs, pull = self.inputs, self.loss.exact.pull
        width = len(inputs.size)
        residual = change @ inputs.matrix
        error = absolute_product(change, inputs.size) * (gamma(width + 3) * inputs.ratio + OUTWARD * inputs.share)
        if pull is not None:
            residual += pull
            size = self.loss.exact.pull_sizes[0]
            error += gamma(width + 6) * torch.where(torch.isfinite(size), size, torch.inf)
        return residual, error

    def gradient(self, change: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """Return S (Z A + P), and a bound of the error of every entry."""
        size, metric, outputs = self.inputs.size, self.loss.metric, self.outputs
        residual, error = self.residual(change)
        if metric is None:
            return residual, torch.outer(error, size)
        if outputs is None:
            gradient = self.rows[:, None] * residual
            return gradient, torch.outer(OUTWARD * self.rows * error, size).add_(gradient.abs(), alpha=4 * UNIT)
        gradient = outputs.matrix @ residual
        each = gamma(len(self.rows) + 3) * outputs.ratio + OUTWARD * outputs.share
        columns = each * residual.abs().T.mv(outputs.size) + OUTWARD * outputs.ratio * (outputs.size @ error) * size
        return gradient, torch.outer(outputs.size, columns)

    def value(self, change: Float[Tensor, "out in"]) -> float:
        """Return a lower bound of f(W + Z) at a change Z."""
        return self.least(change, torch.full_like(self.weight, torch.inf))

    def least(
        self,
        change: Float[Tensor, "out in"],
        curvature: Float[Tensor, "out in"],
        dual: Float[Tensor, "out in"] | None = None,
        mask: Bool[Tensor, "rows in"] | None = None,
    ) -> float:
        """Return a lower bound of min f(X) + <T, X> over all X, or over those that are W + Z outside the mask.

        At any Z: where S (x) A >= diag(c), `curvature`, on the mask, it is the value there less 1/2 sum r_ij^2 / c_ij
        with r = S (Z A + P) + T.
        """
        gradient, error = self.gradient(change)
        pull, pull_error = self.linear_term
        parts = [change * (gradient + pull) / 2]
        residual = gradient
        lost = (change.abs() * (error + pull_error)).sum() / 2
        if dual is not None:
            parts += [change * dual, self.weight * dual]
            residual = gradient + dual
            error = error + UNIT * residual.abs()
        excess = (residual.abs() + error).square_()
        if mask is not None:
            excess = torch.where(mask, excess, 0.0)
        # No loss where the residual is zero, even without curvature.
        excess = torch.where(excess == 0, 0.0, excess / curvature)
        sums = [part.sum(1).sum() for part in parts]
        total, rounded, below = linalg.numbers(
            torch.stack(sums).sum(), torch.stack([part.abs().sum() for part in parts]).sum(), lost + excess.sum() / 2
        )
        return total + self.constant / 2 - OUTWARD * (below + gamma(self.terms) * rounded)
