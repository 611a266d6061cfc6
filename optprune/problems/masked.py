"""Restoration, the best weights on a fixed mask, and the base class of problems that choose the mask."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics.tensors import check_mask
from optprune.problems.base import Problem
from optprune.problems.loss import LayerLoss


@final
@dataclass(frozen=True, eq=False)
class MaskedLeastSquares(Problem):
    """minimise f(V) subject to V_ij = 0 wherever the mask is False.

    V [out, in]; the mask is [out, in], or [1, in] when all rows share it (whole columns removed), in which case one
    factorisation serves all rows. Convex; rows are independent. f is the LayerLoss, in (output)^2 per token.

    Reference: FASP (arXiv 2501.09412), the restoration step; the ridge towards W is ours.
    """

    kind: ClassVar[str] = "masked least squares"

    loss: LayerLoss
    mask: Bool[Tensor, "rows in"]

    def __post_init__(self) -> None:
        rows, width = self.loss.weight.shape
        check_mask("the mask of weights", self.mask, ("rows", width), self.loss.weight)
        if len(self.mask) not in (1, rows):
            raise InputError(f"the mask of {rows} outputs must have {rows} rows or 1 for all, not {len(self.mask)}")

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        # In float64 on every device, as the bounds are, which are compared with it to a millionth.
        return self.loss.exact_value(weight)

    def measuring_error(self, weight: Float[Tensor, "out in"]) -> float:
        return self.loss.exact.measuring_error(weight) / 2

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the number of non-zero entries outside the mask."""
        return float(((weight != 0) & ~self.mask).sum())

    def inputs(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, " in"]:
        """Return the inputs that the mask leaves to some output."""
        return self.mask.any(0)

    def start(self) -> Float[Tensor, "out in"]:
        return torch.where(self.mask, self.loss.weight, 0.0)

    def in_moderate_units(self) -> tuple[Problem, float, float]:
        loss, weights, objective = self.loss.in_moderate_units()
        return (self if loss is self.loss else replace(self, loss=loss)), weights, objective

    def trivial_solution(self, start: Tensor) -> Tensor | None:
        return torch.where(self.mask, start, 0.0) if self.loss.dead else None


class SelectionProblem(Problem):
    """A problem that chooses the weights to keep; once the choice is fixed, restoration remains."""

    kind: ClassVar[str] = "weight selection"

    @abstractmethod
    def project(self, score: Tensor) -> Tensor:
        """Return the admissible choice with exactly the largest total score, for scores [out, in] of weights."""

    @abstractmethod
    def mask(self, choice: Tensor) -> Tensor:
        """Return the mask of the weights that a choice keeps: [out, in], or [1, in] when all rows agree."""

    @abstractmethod
    def support(self, weight: Tensor) -> Tensor:
        """Return the admissible choice of a weight: its non-zeros, completed to the exact count."""

    def within_support(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight that is zero outside its support: feasible, and unchanged if it was feasible."""
        return torch.where(self.mask(self.support(weight)), weight, 0.0)

    def restrict(self, choice: Tensor) -> MaskedLeastSquares:
        """Return the restoration problem on a fixed choice, with the same loss."""
        return MaskedLeastSquares(self.loss, self.mask(choice))

    def in_moderate_units(self) -> tuple[Problem, float, float]:
        loss, weights, objective = self.loss.in_moderate_units()
        return (self if loss is self.loss else replace(self, loss=loss)), weights, objective

    def trivial_solution(self, start: Tensor) -> Tensor | None:
        return self.within_support(start) if self.loss.dead else None
