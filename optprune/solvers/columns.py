"""Columns chosen by a score: the FASP metric, plain magnitude, or chance. No weight that stays is changed."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.problems import LinkedLeastSquares, Problem
from optprune.solvers.base import Answer, DirectSolver


class RankedUnits(DirectSolver):
    """Score every unit, keep the best of each slot, set the columns of the rest to zero; the start is not used."""

    @abstractmethod
    def scores(self, problem: LinkedLeastSquares) -> Float[Tensor, " units"]:
        """The importance of each unit: larger is kept."""

    def why_not(self, problem: Problem) -> str | None:
        if isinstance(problem, LinkedLeastSquares):
            return None
        return f"it ranks the units of a linked problem, and a {problem.kind} problem has none"

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        assert isinstance(problem, LinkedLeastSquares)
        return Answer(problem.zero_outside(problem.pattern.project(self.scores(problem))))


@final
@dataclass(frozen=True)
class FaspMetric(RankedUnits):
    r"""score_j = sum over the columns c of unit j of (sum_i |W_ic|) (E x*_c^2)^(1/2).

    Cost: one pass over W. Reference: FASP (arXiv 2501.09412), the Wanda score summed over a column; the sum over
    the query heads of a KV group is ours.
    """

    def scores(self, problem: LinkedLeastSquares) -> Float[Tensor, " units"]:
        loss = problem.loss
        return problem.link.sum_columns(loss.weight.abs().sum(0) * loss.moments.gram.diagonal().sqrt())


@final
@dataclass(frozen=True)
class MagnitudeColumns(RankedUnits):
    """score_j = the Euclidean norm of the columns of unit j. Cost: one pass over W. The plainest baseline."""

    def scores(self, problem: LinkedLeastSquares) -> Float[Tensor, " units"]:
        return problem.link.sum_columns(problem.loss.weight.square().sum(0))


@final
@dataclass(frozen=True)
class RandomColumns(RankedUnits):
    """Units drawn at random, differently for every problem but always the same for the same problem and seed."""

    seed: int = 0

    def scores(self, problem: LinkedLeastSquares) -> Float[Tensor, " units"]:
        # Cut to 63 bits, since torch takes no larger seed.
        mixed = self.seed * 0x9E3779B1 ^ int(problem.fingerprint()[:12], 16)
        generator = torch.Generator().manual_seed(mixed % 2**63)
        scores = torch.rand(problem.link.units, generator=generator, dtype=torch.float64)
        return scores.to(problem.loss.weight)
