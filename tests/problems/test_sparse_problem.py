"""Sparse least squares: what it measures, and exact counts for every pattern and every solver."""

from dataclasses import dataclass
from typing import final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import NoSolver
from optprune.moments import InputMoments
from optprune.patterns import NM, Pattern, RowWise, Unstructured, largest
from optprune.problems import (
    LayerLoss,
    SelectionProblem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    FistaPath,
    FistaPruner,
    HardThreshold,
    Magnitude,
    PerspectiveBound,
    Restore,
    SparseGpt,
    Swaps,
    Wanda,
    choose,
    solve,
)
from optprune.testing import reference
from optprune.testing.strategies import sparse, structured
from optprune.testing.transformations import random_feasible
from tests.helpers.sparse_cases import PATTERN_NAMES, correlated, correlated_loss

SOLVERS = [
    Magnitude(),
    Wanda(),
    SparseGpt(),
    SparseGpt(block=8),
    Admm(),
    HardThreshold(),
    Swaps(),
    ConjugateGradients(),
    Restore(),
    PerspectiveBound(most=3),
    # An l1 answer may be zero on a part of the mask that it is rounded to (in a group of n of m, say): a refit is not.
    Chain((FistaPath(), ConjugateGradients())),
    Chain((FistaPruner(), ConjugateGradients())),
    Chain((Admm(), ConjugateGradients(), Swaps(), Restore())),
]
ROWS, WIDTH = 6, 24


def count_patterns():
    for keep in (0, 1, 71, 72, ROWS * WIDTH - 1, ROWS * WIDTH):
        yield Unstructured(keep)
    for keep in (0, 1, 7, WIDTH - 1, WIDTH):
        yield RowWise(keep)
    for n, m in ((2, 4), (4, 8), (1, 3), (0, 4), (4, 4), (1, 1), (5, 6)):
        yield NM(n, m)


def assert_exact(weight, pattern):
    kept = (weight != 0).long()
    match pattern:
        case Unstructured(keep):
            assert int(kept.sum()) == keep, pattern
        case RowWise(keep):
            assert kept.sum(1).tolist() == [keep] * ROWS, pattern
        case NM(n, m):
            for row in kept:
                for first in range(0, WIDTH, m):
                    assert int(row[first : first + m].sum()) == n, pattern


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.label)
def test_the_count_asked_for_to_the_entry(solver, dtype):
    loss = correlated_loss(1, ROWS, WIDTH, dtype=dtype)
    for pattern in count_patterns():
        solution = solve(SparseLeastSquares(loss, pattern), solver)
        assert_exact(solution.value, pattern)
        assert solution.violation == 0, pattern


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.label)
def test_never_more_than_the_count_on_dead_inputs_and_zero_rows(solver):
    for name in PATTERN_NAMES:
        problem = correlated(2, ROWS, WIDTH, name)
        loss = problem.loss
        weight, gram = loss.weight.clone(), loss.moments.gram.clone()
        weight[1] = 0
        mean = loss.moments.mean.clone()
        gram[3] = gram[:, 3] = mean[3] = 0
        moments = type(loss.moments).from_averages(gram, mean, loss.moments.tokens)
        damped = type(loss)(weight, moments, loss.damping)
        problem = SparseLeastSquares(damped, problem.pattern)
        solution = solve(problem, solver)
        assert solution.violation == 0, name
        assert problem.pattern.admits(problem.support(solution.value)), name


@given(sparse(), st.integers(0, 100))
def test_violation_is_zero_exactly_on_what_a_mask_of_the_pattern_holds(problem, seed):
    feasible = random_feasible(problem, seed)
    assert problem.violation(feasible) == 0
    assert problem.violation(torch.zeros_like(feasible)) == 0
    assert problem.violation(problem.start()) == 0
    full = torch.ones_like(feasible)
    kept = int(problem.project(full).sum())
    assert problem.violation(full) == full.numel() - kept
    one_more = feasible.clone()
    spare = ((one_more == 0) & ~problem.support(feasible)).nonzero()
    if len(spare) and int((feasible != 0).sum()) == kept:
        one_more[tuple(spare[0].tolist())] = 1.0
        assert problem.violation(one_more) == 1


@given(st.one_of(sparse(), structured()), st.integers(0, 100))
def test_support_holds_what_is_used_and_restrict_is_its_restoration(problem, seed):
    assert isinstance(problem, SelectionProblem)
    weight = random_feasible(problem, seed)
    choice = problem.support(weight)
    mask = problem.mask(choice)
    assert not bool(((weight != 0) & ~mask).any())
    assert problem.pattern.admits(choice)
    restored = problem.restrict(choice)
    assert restored.loss is problem.loss
    assert restored.objective(weight) == problem.objective(weight)
    assert restored.violation(weight) == 0


@given(sparse())
def test_support_of_zero_is_the_largest_original_weights(problem):
    support = problem.support(torch.zeros_like(problem.loss.weight))
    assert torch.equal(support, problem.pattern.project(problem.loss.weight.abs()))


@given(st.one_of(sparse(), structured()), st.integers(0, 100))
def test_projection_is_the_best_choice(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(problem.loss.weight.shape, generator=generator, dtype=torch.float64)
    best = float((score * problem.mask(problem.project(score))).sum())
    for other in range(20):
        choice = problem.support(random_feasible(problem, other))
        assert float((score * problem.mask(choice)).sum()) <= best + 1e-12


@final
@dataclass(frozen=True)
class ColumnWise(Pattern):
    """A user's pattern: keep exactly `keep` entries of every column."""

    keep: int

    def project(self, score):
        return largest(score.T, self.keep).T

    def admits(self, mask):
        return bool((mask.sum(0) == self.keep).all())


def test_a_pattern_of_the_users_own():
    problem = SparseLeastSquares(correlated_loss(3, 4, 3), ColumnWise(2))
    best = reference(problem).optimum
    for solver in SOLVERS:
        if any(isinstance(stage, Swaps | SparseGpt) for stage in getattr(solver, "stages", (solver,))):
            with pytest.raises(NoSolver, match="ColumnWise"):
                solve(problem, solver)
            continue
        solution = solve(problem, solver)
        assert solution.violation == 0
        assert ((solution.value != 0).sum(0) == 2).all()
        # An exact optimum by listing every mask; both sides are well-conditioned float64 sums.
        assert solution.objective >= best * (1 - 1e-9)
        if solution.certificate is not None:
            assert solution.certificate.lower_bound <= best * (1 + 1e-9)


def test_a_pattern_of_the_users_own_gets_more_than_magnitude():
    problem = SparseLeastSquares(correlated_loss(3, 16, 32), ColumnWise(8))
    assert any(isinstance(stage, Admm) for stage in choose(problem).stages)
    assert solve(problem).objective < solve(problem, Chain((Magnitude(), Restore()))).objective


def test_a_selection_problem_of_every_kind_was_met():
    assert set(SelectionProblem.__subclasses__()) == {SparseLeastSquares, StructuredLeastSquares}


def test_the_support_counts_weights_of_dead_inputs_as_all_others() -> None:
    inputs = torch.tensor([[1.0, 2.0, 0.0, 1.0], [3.0, -1.0, 0.0, 2.0], [0.5, 1.0, 0.0, -1.0]])
    weight = torch.tensor([[3.0, 2.0, 9.0, 1.0]])
    moments = InputMoments.from_samples(inputs)
    assert moments.dead.tolist() == [False, False, True, False]
    problem = SparseLeastSquares(LayerLoss.of(weight, moments), RowWise(2))
    for answer, kept in (
        ([0.0, 0.0, 5.0, 5.0], [2, 3]),  # the non-zero ones
        ([0.0, 0.0, 0.0, 5.0], [2, 3]),  # completed by the largest one, of the dead input
        ([0.0, 1.0, 1.0, 8.0], [1, 2]),  # one too many: those of largest original magnitude
    ):
        assert problem.support(torch.tensor([answer]))[0].nonzero().flatten().tolist() == kept
