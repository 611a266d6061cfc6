"""check_solver, as somebody outside optprune uses it: a good solver passes, a broken one is told what it breaks."""

from dataclasses import dataclass, field
from typing import final

import pytest
import torch
from torch import Tensor

from optprune.problems import LinkedLeastSquares, Problem
from optprune.solvers import Answer, DirectSolver
from optprune.testing import check_solver


@final
@dataclass(frozen=True)
class Exhaustive(DirectSolver):
    """An outsider's exact solver for linked problems: every choice, each restored with a pseudo-inverse."""

    def why_not(self, problem: Problem) -> str | None:
        return None if isinstance(problem, LinkedLeastSquares) else "it lists choices of units, and there are none here"

    def exact(self, problem: Problem) -> bool:
        return True

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        assert isinstance(problem, LinkedLeastSquares)
        units = problem.link.units
        masks = (torch.tensor([number >> unit & 1 for unit in range(units)]).bool() for number in range(2**units))
        values = [self._restored(problem, mask) for mask in masks if problem.pattern.admits(mask)]
        best = min(values, key=problem.objective)
        # Keep the start where another choice ties with it: a warm start at the answer must stay there.
        return Answer(start.clone() if problem.objective(start) <= problem.objective(best) else best)

    def _restored(self, problem: LinkedLeastSquares, choice: Tensor) -> Tensor:
        loss, weight = problem.loss, problem.zero_outside(choice)
        kept = problem.link.column_mask(choice, weight.shape[1])[0]
        # Eigenvalues below this are rounding of a Gram matrix of condition 1e8.
        inverse = torch.linalg.pinv(loss.gram[kept][:, kept], rtol=1e-13, hermitian=True)
        weight[:, kept] -= loss.gradient(weight)[:, kept] @ inverse
        return weight


@final
@dataclass(frozen=True)
class Lazy(DirectSolver):
    """Returns the start and claims that it is optimal."""

    def why_not(self, problem: Problem) -> str | None:
        return None

    def exact(self, problem: Problem) -> bool:
        return True

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        return Answer(start.clone())


@final
@dataclass(frozen=True)
class Modest(DirectSolver):
    """Returns the start and claims nothing: a poor solver, but an honest one."""

    def why_not(self, problem: Problem) -> str | None:
        return None

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        return Answer(start.clone())


@final
@dataclass(frozen=True)
class Forgetful(DirectSolver):
    """Remembers how often it was called, so it is not a function of its input."""

    calls: list[int] = field(default_factory=list)

    def why_not(self, problem: Problem) -> str | None:
        return None

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        self.calls.append(1)
        return Answer(start * (1 + 1e-9 * len(self.calls)))


@final
@dataclass(frozen=True)
class Nobody(DirectSolver):
    """Refuses everything."""

    def why_not(self, problem: Problem) -> str | None:
        return f"it dislikes {problem.kind} problems"

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        raise NotImplementedError


@pytest.mark.parametrize("solver", [Exhaustive(), Modest()], ids=lambda solver: solver.label)
def test_a_good_solver_of_an_outsider_passes(solver):
    check_solver(solver)


def test_a_solver_that_returns_its_start_and_claims_the_optimum_is_caught():
    with pytest.raises(AssertionError, match="exact, but its objective is"):
        check_solver(Lazy())


def test_a_solver_that_remembers_is_caught():
    with pytest.raises(AssertionError, match="it gives different answers"):
        check_solver(Forgetful())


def test_a_solver_that_accepts_nothing_is_told_so():
    with pytest.raises(AssertionError, match="Nobody accepted no problem of any kind"):
        check_solver(Nobody(), examples=5)


def test_examples_are_the_same_every_time():
    seen: list[list[str]] = []

    class Watching(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            seen[-1].append(problem.fingerprint())
            return "it only watches"

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            raise NotImplementedError

    for _ in range(2):
        seen.append([])
        with pytest.raises(AssertionError, match="accepted no problem"):
            check_solver(Watching(), examples=10)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 10
