"""The perspective bound: never above the exhaustive optimum, and above nothing."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    PerspectiveBound,
    Restore,
    Swaps,
    solve,
)
from optprune.solvers.perspective import diagonal_split
from optprune.testing import reference
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import linked, sparse
from optprune.testing.transformations import random_feasible
from tests.helpers.sparse_cases import by_pattern, correlated


@given(st.one_of(sparse(), linked()), st.integers(0, 100))
def test_no_perspective_bound_exceeds_the_exhaustive_optimum(problem, seed):
    best = reference(problem)
    for start in (problem.start(), random_feasible(problem, seed), 10 * random_feasible(problem, seed + 1)):
        solution = solve(problem, PerspectiveBound(), start=start)
        slack = best.rounding + rounding(problem.loss, start)
        assert 0 <= solution.certificate.lower_bound <= best.optimum * (1 + 1e-8) + slack
        assert torch.equal(solution.value, start)


@given(sparse())
def test_the_diagonal_split_is_admissible(problem):
    gram = problem.loss.gram
    split = diagonal_split(problem.loss)
    assert bool((split >= 0).all())
    least = float(torch.linalg.eigvalsh(gram - torch.diag(split))[0])
    # Rounding of the eigenvalues of matrices of at most 8 inputs.
    assert least >= -1e-13 * float(gram.diagonal().max())


@by_pattern
def test_the_bound_says_something_where_the_damping_is_not_small(pattern):
    for seed in range(5):
        problem = correlated(seed, 6, 16, pattern)
        problem = replace(problem, loss=problem.loss.damped(1.0))
        answer = solve(problem, Chain((Admm(), ConjugateGradients(), Swaps(), Restore()))).objective
        bound = solve(problem, PerspectiveBound()).certificate.lower_bound
        assert 0.2 * answer < bound <= answer
