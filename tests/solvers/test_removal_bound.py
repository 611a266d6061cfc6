"""The removal bound where the Gram matrix is next to singular, and the inverse that elimination works with there."""

import importlib
from itertools import combinations

import pytest
import torch

from optprune.moments import InputMoments
from optprune.numerics import linalg
from optprune.problems import Channels, LayerLoss, StructuredLeastSquares
from optprune.solvers import GreedyObs, RemovalBound, solve
from optprune.solvers.inverse import InverseForm
from optprune.testing.quadratic import exact_objective
from tests.helpers.faults import noticed

removal_bound = importlib.import_module("optprune.solvers.removal_bound")
WIDTH = 5


def nearly_dependent(seed, noise):
    """Five inputs, the last one another and noise, undamped, and orthogonal columns, of which the bound is tight."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    inputs[:, 4] = inputs[:, 0] + noise * inputs[:, 4]
    weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs))
    return StructuredLeastSquares(loss, Channels.of(WIDTH), 4)


def best_choice(problem):
    """The least exact objective of all choices, each by a least-squares fit that cuts nothing off."""
    gram, target, found = problem.loss.gram, problem.loss.target, []
    for kept in map(list, combinations(range(WIDTH), problem.keep)):
        weight = torch.zeros_like(target)
        weight[:, kept] = torch.linalg.lstsq(gram[kept][:, kept], target[:, kept].T).solution.T
        found.append(exact_objective(problem, weight))
    return min(found)


def test_an_ill_conditioned_inverse_proves_no_more_than_there_is():
    for exponent in (6.5, 7.0, 7.5, 8.0, 9.0):
        for seed in range(20):
            problem = nearly_dependent(seed, 10**-exponent)
            bound = solve(problem, RemovalBound()).certificate.lower_bound
            assert 0 <= bound <= best_choice(problem)


def test_a_well_conditioned_one_proves_nearly_all():
    problem = nearly_dependent(0, 0.1)
    assert solve(problem, RemovalBound()).certificate.lower_bound >= 0.9 * best_choice(problem)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_bound_depends_neither_on_the_order_of_the_columns_nor_on_their_unit(slots):
    """Units at the limit cost the same in the relaxation, so that roundings would decide which of them goes."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs, weight, order = removal_case(generator)
        slot = torch.arange(24) % slots

        def bound(columns, unit, inputs=inputs, weight=weight, slot=slot):
            loss = LayerLoss.of(weight[:, columns], InputMoments.from_samples(inputs[:, columns] * unit), 0.01)
            groups = Channels(torch.arange(24)[:, None], slot[columns])
            found = solve(StructuredLeastSquares(loss, groups, 14), RemovalBound())
            return found.certificate.lower_bound / unit**2

        plain = bound(torch.arange(24), 1.0)
        assert bound(order, 1.0) == pytest.approx(plain, rel=1e-9)
        assert bound(torch.arange(24), 0.3) == pytest.approx(plain, rel=1e-9)


def removal_case(generator):
    """Samples of 24 correlated inputs, a weight, and another order of the inputs."""
    spread = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(120, 24, generator=generator, dtype=torch.float64) @ spread
    return inputs, torch.randn(6, 24, generator=generator, dtype=torch.float64), torch.randperm(24, generator=generator)


def trusted(verified):
    """In the place of `_inverse_root`: an inverse that is taken for exact."""
    factor, failed = linalg.try_cholesky(verified.inputs.scaled)
    if bool(failed):
        return None
    identity = torch.eye(len(factor), dtype=factor.dtype)
    return linalg.solve_lower(factor, identity), 1.0


def test_an_inverse_that_is_taken_for_exact_is_noticed(monkeypatch):
    test = test_an_ill_conditioned_inverse_proves_no_more_than_there_is
    noticed(monkeypatch, removal_bound, "_inverse_root", trusted, test)


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-9, 1e-7])
def test_damping_below_the_rounding_of_the_moments_is_no_error(damping):
    """float32 moments of fewer tokens than inputs: their least eigenvalues are rounding, of either sign."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(20, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
        loss = LayerLoss.of(torch.randn(4, 40, generator=generator), InputMoments.from_samples(inputs), damping)
        problem = StructuredLeastSquares(loss, Channels.of(40), 30)
        assert solve(problem, RemovalBound()).certificate.lower_bound >= 0
        form = InverseForm.of(loss)
        assert len(form.notes) == 1
        solution = solve(problem, GreedyObs())
        assert solution.violation == 0
        assert solution.notes == form.notes
