"""Penalised least squares: the convex problem of the layer loss plus a penalty on the weights."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import check_kind
from optprune.metric import OutputBasis
from optprune.numerics.rounding import gamma
from optprune.penalties import Penalty
from optprune.problems.base import Problem
from optprune.problems.loss import LayerLoss


@final
@dataclass(frozen=True, eq=False)
class PenalisedLeastSquares(Problem):
    """minimise f(V) + P(V) over all V [out, in].

    Convex. Rows are independent where the penalty's are. f is the LayerLoss, in (output)^2 per token, and so is P.

    Reference: FISTAPruner (arXiv 2408.03728), the convex model with the l1 norm of the rows.
    """

    kind: ClassVar[str] = "penalised least squares"

    loss: LayerLoss
    penalty: Penalty

    def __post_init__(self) -> None:
        check_kind("the penalty", self.penalty, Penalty, "give an instance, e.g. L1(0.1)")
        self.penalty.check_shape(self.loss.weight.shape)

    def in_output_basis(self) -> "tuple[Problem, OutputBasis | None]":
        """Return the problem itself: the penalty is defined in the basis of the weights only."""
        return self, None

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        # In float64 on every device, as the bounds are, which are compared with it to a millionth.
        return self.loss.exact_value(weight) + self.penalty.value(weight)

    def measuring_error(self, weight: Float[Tensor, "out in"]) -> float:
        # A penalty is a sum of nonnegative numbers, in any order.
        terms = 2 * weight.numel() + 16
        return self.loss.exact.measuring_error(weight) / 2 + gamma(terms) * self.objective(weight)

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """Return zero for every finite weight."""
        return 0.0 if bool(torch.isfinite(weight).all()) else float("inf")

    def start(self) -> Float[Tensor, "out in"]:
        return self.loss.weight.clone()
