"""Conjugate gradients against restoration, also where equations are singular."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.moments import DenseMoments, InputMoments
from optprune.problems import LayerLoss, MaskedLeastSquares
from optprune.solvers import (
    ConjugateGradients,
    Restore,
    Status,
    Wanda,
    solve,
)
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import masked
from optprune.testing.transformations import random_feasible
from tests.helpers.faults import noticed
from tests.helpers.sparse_cases import by_pattern, correlated


@given(masked(generic=True))
def test_conjugate_gradients_agree_with_restoration(problem):
    exact = solve(problem, Restore())
    found = solve(problem, ConjugateGradients(1e-9))
    assert found.status is Status.CONVERGED
    slack = rounding(problem.loss, exact.value) + rounding(problem.loss, found.value)
    assert abs(found.objective - exact.objective) <= 1e-9 * exact.objective + slack
    # The default stops earlier: by less than a millionth of what restoration gains.
    rough = solve(problem, ConjugateGradients())
    gain = problem.objective(problem.start()) - exact.objective
    assert rough.objective - exact.objective <= 1e-6 * max(gain, 0.0) + slack
    # In exact arithmetic one step an input; a few more in this one, never hundreds.
    assert rough.steps <= 4 * problem.loss.weight.shape[1]


@given(masked(generic=True, dtype=torch.float32), st.integers(0, 8), st.integers(0, 100))
def test_a_start_far_away_ends_where_the_original_weights_do(problem, exponent, seed):
    start = 10.0**exponent * torch.randn(problem.loss.weight.shape, generator=torch.Generator().manual_seed(seed))
    near, far = solve(problem, ConjugateGradients()), solve(problem, ConjugateGradients(), start=start)
    assert far.status is near.status
    gain = problem.objective(problem.start()) - near.objective
    slack = rounding(problem.loss, near.value) + rounding(problem.loss, far.value)
    assert far.objective - near.objective <= 1e-5 * max(gain, 0.0) + slack


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_on_a_singular_mask_stay_small(dtype):
    """Fewer tokens than inputs: what lies outside their directions is left alone, however rounding falls."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        tokens, width = 1 + seed % 6, 8 + seed % 40
        inputs, drift = (torch.randn(tokens, width, generator=generator, dtype=dtype) for _ in range(2))
        moments = InputMoments.from_samples(inputs, inputs + 0.3 * drift)
        loss = LayerLoss.of(torch.ones(3, width), moments)
        problem = MaskedLeastSquares(loss, torch.rand(3, width, generator=generator) < 0.8)
        start = random_feasible(problem, seed)
        solution, exact = solve(problem, ConjugateGradients(1e-7), start=start), solve(problem, Restore())
        assert solution.status is Status.CONVERGED
        assert solution.steps <= 4 * width
        assert solution.objective <= exact.objective + rounding(loss, exact.value) + rounding(loss, solution.value)
        # A residual of rounding over a curvature that is more than rounding is a step of about the weights' own size.
        reached, nearest, before = ((w * loss.input_scale).norm() for w in (solution.value, exact.value, start))
        assert reached <= 2 * (nearest + before)


def test_conjugate_gradients_say_where_equations_contradict_each_other():
    """A gradient that does not vanish in a direction without curvature, as no real tokens give it."""
    gram = torch.ones(2, 2)
    dense = DenseMoments(gram - torch.diag(torch.tensor([1.0, -1.0])), 9 * torch.eye(2), torch.zeros(2))
    loss = LayerLoss.of(torch.ones(1, 2), InputMoments.from_averages(gram, torch.zeros(2), 8, dense))
    solution = solve(MaskedLeastSquares(loss, torch.ones(1, 2, dtype=torch.bool)), ConjugateGradients())
    assert solution.status is Status.STALLED
    assert bool(torch.isfinite(solution.value).all())


@by_pattern
def test_a_refit_by_gradients_keeps_the_support_and_nearly_the_restored_objective(pattern):
    for seed in range(5):
        problem = correlated(seed, 6, 16, pattern)
        chosen = solve(problem, Wanda()).value
        found, exact = solve(problem, ConjugateGradients(), start=chosen), solve(problem, Restore(), start=chosen)
        assert not bool(((found.value != 0) & (chosen == 0)).any())
        assert found.objective == pytest.approx(exact.objective, rel=1e-6)


# -- faults planted: heuristics promise little to the laws, so these tests must notice

gradients_init = ConjugateGradients.init


def negative_preconditioner(self, problem, start):
    state = gradients_init(self, problem, start)
    return replace(state, inverse_diagonal=-state.inverse_diagonal, direction=-state.direction, energy=-state.energy)


def test_a_preconditioner_of_the_wrong_sign_is_noticed(monkeypatch):
    check = test_conjugate_gradients_agree_with_restoration
    noticed(monkeypatch, ConjugateGradients, "init", negative_preconditioner, check)
