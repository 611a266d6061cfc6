"""The perspective bound: never above the exhaustive optimum, and a good part of it where inputs are damped."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.moments import InputMoments
from optprune.numerics.rounding import KnownMatrix
from optprune.patterns import NM, RowWise
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import Admm, Chain, ConjugateGradients, PerspectiveBound, Restore, Swaps, solve
from optprune.solvers.perspective import split_off
from optprune.testing import reference
from optprune.testing.quadratic import exact_objective
from optprune.testing.strategies import losses, sparse, structured
from optprune.testing.transformations import random_feasible
from tests.helpers.sparse_cases import by_pattern, correlated


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(st.one_of(sparse(), structured()), st.integers(0, 100))
def test_no_perspective_bound_exceeds_the_exhaustive_optimum(problem, seed):
    best = exact_objective(problem, reference(problem).weight)
    for start in (problem.start(), random_feasible(problem, seed)):
        solution = solve(problem, PerspectiveBound(30), start=start)
        assert 0 <= solution.certificate.lower_bound <= best
        assert torch.equal(solution.value, start)


@given(losses())
def test_the_diagonal_split_is_admissible(loss):
    known = KnownMatrix.of(loss.exact.moments.covariance, loss.damping, loss.exact.moments.mean)
    split = split_off(known, torch.ones_like(known.size))
    assert bool((split >= 0).all())
    # The proof leaves more room than the rounding of these eigenvalues.
    least = float(torch.linalg.eigvalsh((known.matrix - torch.diag(split)) / torch.outer(known.unit, known.unit))[0])
    assert least >= -1e-15 * len(split)


def test_the_diagonal_split_is_the_best_one():
    """Of [[1, a], [a, 1]] it is 1 - a on the diagonal; of a diagonal matrix all of it."""
    known = KnownMatrix.of(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), torch.zeros(2))
    split = split_off(known, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(split, torch.full((2,), 0.4, dtype=torch.float64), rtol=0.02)
    known = KnownMatrix.of(torch.diag(torch.tensor([1e-12, 1.0, 1e12])), torch.zeros(3))
    assert torch.allclose(split_off(known, torch.ones(3).double()), known.matrix.diagonal(), rtol=0.02)


@pytest.mark.e2e
@by_pattern
def test_the_bound_is_a_good_part_of_the_best_objective(pattern):
    """Of inputs whose covariance has eigenvalues 1, 1/2, 1/3, ..., damped by 1 percent, as activations nearly have."""
    shares = []
    for seed in range(5):
        problem = correlated(seed, 6, 16, pattern)
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(400, 16, generator=generator, dtype=torch.float64) / torch.arange(1, 17).double().sqrt()
        basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
        moments = InputMoments.from_samples(inputs @ basis)
        problem = replace(problem, loss=LayerLoss.of(problem.loss.weight, moments, 0.01))
        best = solve(problem, Chain((Admm(), ConjugateGradients(), Swaps(), Restore()))).objective
        shares.append(solve(problem, PerspectiveBound()).certificate.lower_bound / best)
    # Measured: see the docstring of the solver for layers of a real model.
    assert sorted(shares)[2] > 0.3
    assert max(shares) <= 1


def test_independent_inputs_leave_no_gap():
    """Then each weight costs what it costs, and the relaxation is exact."""
    generator = torch.Generator().manual_seed(0)
    gram = torch.diag(torch.rand(8, generator=generator, dtype=torch.float64) + 0.1)
    moments = InputMoments(gram, torch.zeros(8, dtype=torch.float64), 100)
    for pattern in (RowWise(4), NM(2, 4)):
        loss = LayerLoss.of(torch.randn(3, 8, generator=generator, dtype=torch.float64), moments)
        problem = SparseLeastSquares(loss, pattern)
        solution = solve(problem, PerspectiveBound(), start=solve(problem).value)
        assert 0 <= solution.gap <= 0.02
