"""ADMM step by step: the split, the penalty's schedule and the end, against a loop written from ALPS' description."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.numerics import linalg
from optprune.patterns import Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import Admm, Status, solve
from tests.helpers.sparse_cases import PATTERN_NAMES, correlated, correlated_loss, half


def factor_of(changes: int, kept: int) -> float:
    """ALPS: entries that entered or left the support since the last look, as a share of its size k."""
    if changes > 0.1 * kept:
        return 1.3
    if changes > 0.005 * kept:
        return 1.2
    return 1.1 if changes else 1.0


def literal_admm(problem, rho=0.1, haste=1.0, every=3):
    """(rho, Z, support) after every step, until the support stood still between two looks; Z in the weight's units."""
    loss = problem.loss
    size = loss.gram.diagonal().sqrt()
    gram, target = loss.gram / size / size[:, None], loss.target / size
    sparse, dual = loss.weight * size, torch.zeros_like(target)
    last = problem.pattern.project(sparse.square())
    for step in range(1, 301):
        if loss.metric is None:
            dense = torch.linalg.solve(
                gram + rho * torch.eye(len(gram)).to(gram), target - dual + rho * sparse, left=False
            )
        else:  # S V A + rho V = S B - U + rho Z, all its equations at once
            equations = torch.kron(loss.metric.matrix, gram) + rho * torch.eye(target.numel()).to(gram)
            right = loss.metric.matrix @ target - dual + rho * sparse
            dense = torch.linalg.solve(equations, right.reshape(-1)).reshape(target.shape)
        kept = problem.pattern.project((dense + dual / rho).square())
        sparse = torch.where(kept, dense + dual / rho, 0.0)
        dual = dual + rho * (dense - sparse)
        changes = -1
        if step % every == 0:
            changes, last = int((kept != last).sum()), kept
            rho *= factor_of(changes, int(kept.sum())) ** haste
        yield rho, sparse / size, kept
        if changes == 0:
            return


def check(problem, solver):
    rhos = [solver.rho]
    state = solver.init(problem, problem.start())
    for rho, value, kept in literal_admm(problem, rho=solver.rho, haste=solver.haste, every=solver.every):
        assert solver.done(problem, state) is None
        state = solver.step(problem, state)
        rhos.append(rho)
        assert state.rho == pytest.approx(rho, rel=1e-12)
        assert torch.equal(state.mask, kept)
        # Float64 systems whose conditioning is at most 1 / rho, solved in two ways, a few dozen times in turn.
        assert torch.allclose(solver.value(problem, state), value, rtol=1e-7, atol=1e-9)
    assert solver.done(problem, state) is Status.CONVERGED
    assert solve(problem, solver).steps == len(rhos) - 1
    return [after / before for before, after in pairwise(rhos)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_admm_is_the_literal_loop(pattern, seed):
    factors = check(correlated(seed, 8, 16, pattern), Admm())
    assert all(factor == 1 for step, factor in enumerate(factors, 1) if step % 3)
    # Something moved at the first look, and nothing at the last.
    assert factors[2] > 1 and factors[-1] == 1


def test_every_factor_of_the_schedule_has_its_turn():
    """A weight large enough that one exchange is less than half a percent of it."""
    factors = check(correlated(0, 16, 64, "unstructured"), Admm())
    assert {round(factor, 9) for factor in factors} == {1.0, 1.1, 1.2, 1.3}


@pytest.mark.parametrize("solver", [Admm(rho=1.0), Admm(haste=1 / 3), Admm(every=5)], ids=repr)
def test_options_change_the_loop_as_they_say(solver):
    check(correlated(1, 8, 16, "rows"), solver)


def test_rows_that_a_metric_couples():
    loss = correlated_loss(0, 6, 12)
    gradients = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = OutputMetric.from_samples(gradients).damped(0.1).row_scaled()
    assert metric is not None and metric.full
    check(SparseLeastSquares(replace(loss, metric=metric), half("rows", 6, 12)), Admm())


def test_the_step_limit_is_no_convergence():
    problem = correlated(0, 8, 16, "unstructured")
    steps = solve(problem, Admm()).steps
    cut = solve(problem, Admm(most=steps - 1))
    assert (cut.status, cut.steps) == (Status.STEP_LIMIT, steps - 1)
    assert solve(problem, Admm(most=steps)).status is Status.CONVERGED


def test_layers_of_the_same_inputs_are_decomposed_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments.from_samples(torch.randn(64, 8, generator=generator))
    decompose, sizes = linalg.eigh_in_place, []
    monkeypatch.setattr(linalg, "eigh_in_place", lambda matrix: sizes.append(len(matrix)) or decompose(matrix))

    def answer(moments, damping, **more):
        loss = LayerLoss.of(torch.ones(4, 8).cumsum(1), moments, damping, **more)
        return solve(SparseLeastSquares(loss, Unstructured(16)), Admm()).value

    first, second = answer(moments, 0.01), answer(moments, 0.01)
    assert sizes == [8]
    answer(moments, 0.1)
    answer(moments, 0.1, fit_bias=True)
    assert sizes == [8, 8, 8]
    assert torch.equal(first, second)
    assert torch.equal(first, answer(moments.to(torch.float32), 0.01))
