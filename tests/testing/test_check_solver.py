"""check_solver: a good solver of an outsider passes, each kind of broken one fails, and it says why."""

from dataclasses import dataclass

import pytest
import torch

from optprune.problems import MaskedLeastSquares, StructuredLeastSquares
from optprune.solvers import (
    Answer,
    Certificate,
    Chain,
    DirectSolver,
    FaspMetric,
    Random,
    Restore,
    Solver,
    Status,
)
from optprune.testing import check_solver
from optprune.work import Work


@dataclass(frozen=True)
class PseudoInverse(DirectSolver[MaskedLeastSquares]):
    """An outsider's restoration, row by row by pseudo-inverses: right, and plain."""

    accepts = (MaskedLeastSquares,)

    def unsupported(self, problem):
        return "it restores row by row, and the full output metric couples them" if problem.loss.coupled else None

    def exact(self, problem):
        return True

    def work(self, outputs, inputs, *, coupled=False):
        return Work()

    def answer(self, problem, start):
        loss, value = problem.loss, problem.start()
        size = (loss.moments.gram.diagonal() + loss.damping).sqrt()
        size = torch.where(size > 0, size, 1.0)
        gradient, gram = loss.gradient(value) / size, loss.gram / torch.outer(size, size)
        for row, kept in enumerate(problem.mask.expand(value.shape)):
            # In units of the inputs' sizes the rounding of the Gram matrix is relative to its largest eigenvalue.
            rounding = 4 * len(kept) * torch.finfo(value.dtype).eps
            inverse = torch.linalg.pinv(gram[kept][:, kept], rcond=rounding, hermitian=True)
            value[row, kept] -= gradient[row, kept] @ inverse / size[kept]
        return Answer(value)


@dataclass(frozen=True)
class Descent(Solver[MaskedLeastSquares, tuple[int, torch.Tensor]]):
    """An outsider's iteration without promises: a few gradient steps of a safe length."""

    def unsupported(self, problem):
        return None if isinstance(problem, MaskedLeastSquares) else "it only restores"

    def monotone(self, problem):
        return True

    def work(self, outputs, inputs, *, coupled=False):
        return Work()

    def init(self, problem, start):
        return 0, start

    def step(self, problem, state):
        # The trace bounds the largest eigenvalue.
        length = 1 / problem.loss.gram.trace().clamp(min=1e-300)
        return state[0] + 1, state[1] - length * problem.loss.gradient(state[1]) * problem.mask

    def done(self, problem, state):
        return Status.STALLED if state[0] == 5 else None

    def value(self, problem, state):
        return state[1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "solver",
    [
        PseudoInverse(),
        pytest.param(Restore(), marks=pytest.mark.slow),
        FaspMetric(),
        pytest.param(Random(), marks=pytest.mark.slow),
        pytest.param(Chain((FaspMetric(), Restore())), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_good_solvers_pass(solver):
    check_solver(solver, examples=15)


@pytest.mark.e2e
def test_a_good_iteration_passes():
    class Copying(Descent):
        def value(self, problem, state):
            return state[1].clone()

    check_solver(Copying(), examples=15)


class Broken(DirectSolver):
    """Restore, spoiled by a subclass."""

    def unsupported(self, problem):
        return None if isinstance(problem, MaskedLeastSquares) else "it only restores"

    def work(self, outputs, inputs, *, coupled=False):
        return Work()

    def good(self, problem):
        return Restore().answer(problem, problem.start())

    def answer(self, problem, start):
        return self.good(problem)


class Infeasible(Broken):
    def answer(self, problem, start):
        return Answer(torch.ones_like(problem.loss.weight))


class NotExact(Broken):
    def exact(self, problem):
        return True

    def answer(self, problem, start):
        return Answer(problem.start())


class NotConverged(Broken):
    def exact(self, problem):
        return True

    def done(self, problem, state):
        return Status.STALLED


class WorseThanStart(Broken):
    def monotone(self, problem):
        return True

    def answer(self, problem, start):
        return Answer(3 * problem.start())


class TooHighBound(Broken):
    def answer(self, problem, start):
        value = self.good(problem).value
        return Answer(value, Certificate(1.001 * problem.objective(value) + 1e-3, "wishful thinking"))


class ChangesTheProblem(Broken):
    def answer(self, problem, start):
        answer = self.good(problem)
        problem.loss.weight.mul_(1.5)
        return answer


class ChangesTheStart(Broken):
    def answer(self, problem, start):
        start.add_(1)
        return self.good(problem)


class ReturnsTheWeight(Broken):
    def unsupported(self, problem):
        return (
            None
            if isinstance(problem, StructuredLeastSquares) and problem.keep == problem.channels.units
            else "not all"
        )

    def answer(self, problem, start):
        return Answer(problem.loss.weight)


class OtherDtype(Broken):
    def answer(self, problem, start):
        return Answer(self.good(problem).value.float())


class AlwaysDouble(Broken):
    def answer(self, problem, start):
        return Answer(self.good(problem).value.double())


class Seeds(Broken):
    def answer(self, problem, start):
        torch.manual_seed(0)
        return self.good(problem)


class GlobalRandomness(Broken):
    def answer(self, problem, start):
        return Answer(problem.start() * torch.rand(()))


class NotANumber(Broken):
    def answer(self, problem, start):
        return Answer(problem.start() + torch.nan * problem.mask)


class RefusesWithoutReason(Broken):
    def unsupported(self, problem):
        return None if isinstance(problem, MaskedLeastSquares) else ""


class RefusesEverything(Broken):
    def unsupported(self, problem):
        return "it does not feel like it"


class MixesRows(Broken):
    def exact(self, problem):
        return True

    def answer(self, problem, start):
        value = self.good(problem).value
        return Answer(torch.where(problem.mask, value.mean(0).expand_as(value), 0.0))


BROKEN = {
    Infeasible: "violates",
    NotExact: "exact, but its objective",
    NotConverged: "exact, but it stopped",
    WorseThanStart: "made its start worse",
    TooHighBound: "lower bound",
    ChangesTheProblem: "writes into the weight",
    ChangesTheStart: "changed its start",
    ReturnsTheWeight: "original weight itself",
    OtherDtype: "dtype",
    AlwaysDouble: r"is torch\.float64 on cpu, but the weight of the problem is torch\.float32",
    Seeds: "random state",
    GlobalRandomness: "random state",
    NotANumber: "NaN",
    RefusesWithoutReason: "without a reason",
    RefusesEverything: "accepted no problem",
    MixesRows: "made its start worse|exact, but its objective",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_broken_solvers_fail_with_the_reason(broken):
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_solver(broken(), examples=40, shrink=False)
