"""Rankings by a score: magnitude, random, Wanda, FASP and FLAP.

Kept weights are unchanged, except for a rounding where a metric scales the rows before and after.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import SelectionProblem, SparseLeastSquares, StructuredLeastSquares
from optprune.solvers.base import Answer, DirectSolver, measuring
from optprune.system.wording import shown
from optprune.work import Work, selection, storage, sweeps

P = TypeVar("P", bound=SelectionProblem)


class Ranking(DirectSolver[P]):
    """Score every weight, keep the admissible choice with the largest total, set the rest to zero.

    In a structured problem the score of a unit is the sum over its columns. The start is not used.
    """

    accepts = (SelectionProblem,)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        flops = measuring(outputs, inputs, coupled=coupled) + selection(outputs, inputs) + sweeps(25, outputs, inputs)
        form = (6.8, 62.5, 27.0) if coupled else (3.6, 44.0)
        return Work(flops, storage(outputs, inputs, *form))

    @abstractmethod
    def scores(self, problem: P) -> Float[Tensor, "out in"]:
        """Return the importance of each weight; the larger ones are kept."""

    def answer(self, problem: P, start: Tensor) -> Answer:
        choice = problem.project(self.scores(problem))
        return Answer(torch.where(problem.mask(choice), problem.loss.weight, 0.0))


@final
@dataclass(frozen=True)
class Magnitude(Ranking[SelectionProblem]):
    """score_ij = W_ij^2: the largest weights, or the units of largest norm. Cost: one pass over W. The plainest one."""

    def scores(self, problem: SelectionProblem) -> Float[Tensor, "out in"]:
        # In float64, so that squares of small weights do not underflow.
        return problem.loss.weight.double().square()


@final
@dataclass(frozen=True)
class Random(Ranking[SelectionProblem]):
    """Weights or units drawn at random, differently for every problem, always the same for one problem and seed."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed of {self.label} must be between 0 and {2**63 - 1}, not {shown(self.seed)}")

    def scores(self, problem: SelectionProblem) -> Float[Tensor, "out in"]:
        # Cut to 63 bits, because torch takes no larger seed.
        mixed = self.seed * 0x9E3779B1 ^ int(problem.fingerprint()[:12], 16)
        # On the CPU for every device, so that all draw the same.
        generator = torch.Generator("cpu").manual_seed(mixed % 2**63)
        scores = torch.rand(problem.loss.weight.shape, generator=generator, dtype=torch.float64, device="cpu")
        return scores.to(problem.loss.weight.device)


@final
@dataclass(frozen=True)
class Wanda(Ranking[SparseLeastSquares]):
    """score_ij = |W_ij| (E x*_j^2)^(1/2). Cost: one pass over W. Reference: Wanda (arXiv 2306.11695).

    The paper compares weights within each output row: that is the pattern RowWise, or under any other `by_row`, where
    the score is a weight's rank in its row, so that rows keep equally many as nearly as the pattern lets them. Its sum
    over units is FaspMetric.
    """

    accepts = (SparseLeastSquares,)

    by_row: bool = False

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        work = super().work(outputs, inputs, coupled=coupled)
        # Two sorts of every row.
        return work + Work(sweeps(220, outputs, inputs)) if self.by_row else work

    def scores(self, problem: SparseLeastSquares) -> Float[Tensor, "out in"]:
        score = problem.loss.weight.abs() * problem.loss.moments.mean_square.sqrt()
        if not self.by_row:
            return score
        # Of equal scores the first stays, so the last has the lowest rank.
        return score.flip(1).argsort(dim=1, stable=True).argsort(dim=1).flip(1).to(score)


class UnitRanking(Ranking[StructuredLeastSquares]):
    """A ranking of whole units."""

    accepts = (StructuredLeastSquares,)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # Few units are compared.
        selected = Work(-selection(outputs, inputs) - sweeps(25, outputs, inputs))
        return super().work(outputs, inputs, coupled=coupled) + selected


@final
@dataclass(frozen=True)
class FaspMetric(UnitRanking):
    r"""score_j = sum over the columns c of unit j of (sum_i |W_ic|) (E x*_c^2)^(1/2).

    Cost: one pass over W. Reference: FASP (arXiv 2501.09412), the Wanda score summed over a column; the sum over
    the query heads of a KV group is ours.
    """

    def scores(self, problem: StructuredLeastSquares) -> Float[Tensor, "out in"]:
        return problem.loss.weight.abs() * problem.loss.moments.mean_square.sqrt()


@final
@dataclass(frozen=True)
class FlapMetric(UnitRanking):
    r"""score_j = sum over the columns c of unit j of m_c^2, m_c = |W_c|^2 Var(x*_c): no bias replaces this part.

    The squares are those of the released code, which sums them over a head; a unit of one column is ranked by m_c, in
    the same order. That code takes all statistics from the dense model; here the recipe's policy applies.

    FLAP then adds the mean W_c E[x*_c] of the removed columns to a bias. Where the layer has a bias (`fit_bias`),
    `bias_change` of the loss is this compensation. Where it has none, none is added, although Llama's class supports
    one (`attention_bias`, `mlp_bias`): the means are lost, and the loss includes that. FLAP standardises its scores to
    compare layers, which changes nothing within one. Cost: one pass over W.

    Reference: FLAP (its released code); no weight is restored there either.
    """

    def scores(self, problem: StructuredLeastSquares) -> Float[Tensor, "out in"]:
        fluctuation = problem.loss.weight.square() * problem.loss.moments.covariance.diagonal()
        if problem.channels.columns.shape[1] == 1:
            return fluctuation
        # Every column sums to its square; in float64, so that squares of small numbers do not underflow.
        fluctuation = fluctuation.double()
        return fluctuation * fluctuation.sum(0)
