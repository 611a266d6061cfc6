"""Single weights chosen by a score: magnitude and Wanda. No weight that stays is changed."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.problems import Problem, SparseLeastSquares
from optprune.solvers.base import Answer, DirectSolver


class RankedEntries(DirectSolver):
    """Score every weight, keep the best mask of the pattern, set the rest to zero; the start is not used."""

    @abstractmethod
    def scores(self, problem: SparseLeastSquares) -> Float[Tensor, "out in"]:
        """The importance of each weight: larger is kept."""

    def why_not(self, problem: Problem) -> str | None:
        if isinstance(problem, SparseLeastSquares):
            return None
        return f"it ranks single weights under a pattern, and a {problem.kind} problem has none"

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        assert isinstance(problem, SparseLeastSquares)
        return Answer(torch.where(problem.pattern.project(self.scores(problem)), problem.loss.weight, 0.0))


@final
@dataclass(frozen=True)
class Magnitude(RankedEntries):
    """score_ij = |W_ij|. Cost: one pass over W."""

    def scores(self, problem: SparseLeastSquares) -> Float[Tensor, "out in"]:
        return problem.loss.weight.abs()


@final
@dataclass(frozen=True)
class Wanda(RankedEntries):
    """score_ij = |W_ij| (E x*_j^2)^(1/2). Cost: one pass over W. Reference: Wanda (arXiv 2306.11695).

    The paper compares weights within each output row: that is the pattern RowWise.
    """

    def scores(self, problem: SparseLeastSquares) -> Float[Tensor, "out in"]:
        return problem.loss.weight.abs() * problem.loss.moments.gram.diagonal().sqrt()
