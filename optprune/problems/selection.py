"""What the mixed-integer problems share: a choice of what to keep, and restoration once it is made."""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from optprune.problems.base import Problem
from optprune.problems.masked import MaskedLeastSquares


class SelectionProblem(Problem):
    """A problem whose difficulty is which weights to keep: once the choice is fixed, restoration remains."""

    kind: ClassVar[str] = "weight selection"

    @abstractmethod
    def project(self, score: Tensor) -> Tensor:
        """The admissible choice with the largest total score, exactly, for scores [out, in] of single weights."""

    @abstractmethod
    def mask(self, choice: Tensor) -> Tensor:
        """The weights that a choice keeps: [out, in], or [1, in] when all rows agree."""

    @abstractmethod
    def support(self, weight: Tensor) -> Tensor:
        """The admissible choice that a weight stands for (its non-zeros, completed to the exact count)."""

    def within_support(self, weight: Tensor) -> Tensor:
        """A copy of a weight, zero outside its support: the same numbers if it is feasible, feasible in any case."""
        return torch.where(self.mask(self.support(weight)), weight, 0.0)

    def restrict(self, choice: Tensor) -> MaskedLeastSquares:
        """The restoration problem on a fixed choice, with the same loss."""
        return MaskedLeastSquares(self.loss, self.mask(choice))

    def in_moderate_units(self) -> tuple[Problem, float, float]:
        loss, weights, objective = self.loss.in_moderate_units()
        return (self if loss is self.loss else replace(self, loss=loss)), weights, objective

    def indifferent(self, start: Tensor) -> Tensor | None:
        return self.within_support(start) if self.loss.dead else None
