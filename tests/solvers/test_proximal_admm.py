"""ADMM for penalties: the optimum on ill-conditioned matrices, and what each of its parts is there for."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.metric import OutputMetric
from optprune.penalties import L1, WeightedL1
from optprune.problems import PenalisedLeastSquares
from optprune.solvers import Fista, ProximalAdmm, solve
from optprune.solvers.duality import DualMap
from optprune.testing import check_solver, reference
from optprune.testing.quadratic import rounding
from optprune.testing.references import PENALISED_ACCURACY
from optprune.testing.strategies import penalised
from optprune.testing.transformations import in_units
from tests.helpers.convex_cases import (
    MOST_STEPS,
    PENALTY_NAMES,
    ROWS,
    WIDTH,
    assert_reaches_the_optimum,
    ill_conditioned,
    penalty_of,
)
from tests.helpers.faults import halved_prox

module = importlib.import_module("optprune.solvers.proximal_admm")


def l1_problem(share=0.1, seed=1, damping=1e-3):
    loss = ill_conditioned(seed, dense=True).damped(damping)
    return PenalisedLeastSquares(loss, penalty_of("l1", loss, share))


@pytest.mark.parametrize("dense", [False, True], ids=["same inputs", "dense inputs"])
@pytest.mark.parametrize("share", [1e-3, 0.1])
@pytest.mark.parametrize("kind", PENALTY_NAMES)
def test_reaches_the_convex_optimum_on_condition_1e8(kind, share, dense):
    assert_reaches_the_optimum(ProximalAdmm(), kind, share, dense)


@given(penalised(), st.integers(0, 100))
def test_a_bound_from_any_dual_point_is_a_bound(problem, seed):
    best, dual = reference(problem), DualMap.of(problem)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problem.loss.weight.shape, generator=generator, dtype=torch.float64)
    size = float(problem.loss.target.abs().max()) or 1.0
    for point in (torch.zeros_like(noise), size * noise, 1e-3 * size * noise, 1e3 * size * noise, problem.loss.linear):
        bound = dual.bound_at(point)
        assert (bound is None) == (dual.bend > 0)
        if bound is not None:
            least = dual.verified.weight + dual.minimiser
            terms = rounding(problem.loss, least - dual._inverse(point)) + rounding(problem.loss, least)
            assert 0 <= bound <= best.optimum + best.rounding + terms


def test_a_dual_point_outside_the_domain_is_brought_inside():
    """Far outside the bound would be that of another, larger penalty, which is far above the optimum."""
    problem = l1_problem()
    dual, best = DualMap.of(problem), reference(problem).optimum
    outside = problem.loss.linear
    assert float(outside.abs().max()) > 5 * problem.penalty.strength
    nearest = dual.verified.weight + dual.minimiser - dual._inverse(outside)
    assert problem.loss.exact_value(nearest) + float((outside * nearest).sum()) > 1.1 * best
    assert 0 <= dual.bound_at(outside) <= best * (1 + PENALISED_ACCURACY)


def test_a_metric_that_couples_the_outputs_gives_the_optimum_of_the_whole_system():
    loss = ill_conditioned(2, dense=True).damped(1e-2)
    root = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metric = OutputMetric(root @ root.T, torch.full((ROWS,), 0.1, dtype=torch.float64), 100)
    coupled = replace(loss, metric=metric)
    problem = PenalisedLeastSquares(coupled, L1(0.05 * float(coupled.linear.abs().max())))
    found = solve(problem, ProximalAdmm(1e-9), max_steps=MOST_STEPS)
    assert found.gap <= 1e-9
    # Optimality of the whole system, entry by entry, whatever solved it: -S (V A - B) is a subgradient of the penalty.
    whole = torch.kron(metric.matrix, coupled.gram)
    weight, strength = found.value, problem.penalty.strength
    pull = (coupled.linear.flatten() - whole @ weight.flatten()).reshape(weight.shape)
    assert bool((pull.abs() <= strength * (1 + 1e-3)).all())
    kept = weight != 0
    assert bool(kept.any())
    assert not bool(kept.all())
    torch.testing.assert_close(pull[kept], strength * weight[kept].sign(), rtol=1e-2, atol=0.0)


def steps_to(problem, solver, gap=1e-6):
    """The steps after which the objective is within a gap of the optimum, found by another solver."""
    best = solve(problem, Fista(1e-10), max_steps=MOST_STEPS).objective
    state = solver.init(problem, problem.start())
    for step in range(1, 5000):
        state = solver.step(problem, state)
        if problem.objective(state.weight) <= best * (1 + gap):
            return step
    return 5000


def test_the_closed_form_of_the_loss_needs_fewer_steps_than_gradients():
    problem = l1_problem(share=0.01)
    mine = solve(problem, ProximalAdmm(), max_steps=MOST_STEPS)
    theirs = solve(problem, Fista(), max_steps=MOST_STEPS)
    assert mine.gap <= 1e-6
    assert mine.steps < theirs.steps


def test_relaxation_saves_steps():
    problem = l1_problem()
    assert steps_to(problem, ProximalAdmm()) < steps_to(problem, ProximalAdmm(relaxation=1.0))


def test_the_dual_variable_proves_more_than_the_gradient():
    """At one iterate: the gap by the dual variable is far below that by the gradient."""
    problem, solver = l1_problem(), ProximalAdmm()
    state = solver.init(problem, problem.start())
    for _ in range(60):
        state = solver.step(problem, state)
    objective, dual = problem.objective(state.weight), state.monitor.dual
    by_dual = objective - dual.bound_at(state.resolvent.weights * state.dual)
    by_gradient = objective - dual.bound(state.weight)
    assert 0 <= by_dual < by_gradient / 10


@pytest.mark.parametrize("rho", [1e-6, 1e6])
def test_a_rho_far_off_is_put_right(rho, monkeypatch):
    problem, solver = l1_problem(), ProximalAdmm(rho=rho)
    balanced = solve(problem, solver, max_steps=2000)
    assert balanced.gap <= 1e-6
    monkeypatch.setattr(module, "MOST_CHANGES", 0)
    assert solve(problem, solver, max_steps=2000).gap > 1e-3


def test_units_of_the_inputs_do_not_matter():
    """With inputs in other units and the penalty in theirs, the steps are the same."""
    problem = l1_problem()
    units = torch.logspace(-3, 3, WIDTH, dtype=torch.float64)
    strengths = WeightedL1((problem.penalty.strength * units).expand(ROWS, WIDTH))
    scaled = PenalisedLeastSquares(in_units(problem.loss, units), strengths)
    mine, theirs = solve(problem, ProximalAdmm(), max_steps=5000), solve(scaled, ProximalAdmm(), max_steps=5000)
    assert mine.steps == theirs.steps
    # Two answers within 1e-6 of one optimum; without columns' own R the second is far from it after as many steps.
    assert abs(mine.objective - theirs.objective) <= 2e-6 * mine.objective


solved, of, step = module.ByInverse.solved, module.ByInverse.of, ProximalAdmm.step


def inverse_of_the_gram_alone(loss, rho, *, by_column):
    return replace(of(loss, 1e-9, by_column=by_column), weights=of(loss, rho, by_column=by_column).weights)


def prox_forgotten(self, problem, state):
    return step(self, replace(problem, penalty=L1(0.0)), state)


def dual_forgotten(self, problem, state):
    return replace(step(self, problem, state), dual=torch.zeros_like(state.dual))


def target_forgotten(self, problem, state):
    after = step(self, problem, state)
    return replace(after, dual=after.dual + problem.loss.linear)


FAULTS = {
    "inverse of the Gram matrix alone": (module.ByInverse, "of", inverse_of_the_gram_alone),
    "prox forgotten": (ProximalAdmm, "step", prox_forgotten),
    "dual variable forgotten": (ProximalAdmm, "step", dual_forgotten),
    "dual variable of another size": (ProximalAdmm, "step", target_forgotten),
    "threshold halved": (L1, "prox", halved_prox),
}


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_by_the_laws(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match=r"promises|bound|worse|below|NaN"):
        check_solver(ProximalAdmm(), examples=20, shrink=False)


def first_change(problem, solver):
    """The state before the step that first changes rho, and the one after it."""
    state = solver.init(problem, problem.start())
    for _ in range(200):
        before, state = state, solver.step(problem, state)
        if state.changes:
            return before, state
    raise AssertionError("rho was never changed")


@pytest.mark.parametrize("rho", [1e-6, 1e6])
def test_a_change_of_rho_leaves_the_subgradient_as_it_was(rho, monkeypatch):
    """R U is a subgradient of the penalty, whatever R: where R grows the scaled dual variable must shrink."""
    problem, solver = l1_problem(), ProximalAdmm(rho=rho)
    before, after = first_change(problem, solver)
    monkeypatch.setattr(module, "MOST_CHANGES", 0)
    unchanged = solver.step(problem, before)
    assert after.resolvent.rho != unchanged.resolvent.rho
    expected = unchanged.resolvent.weights * unchanged.dual
    assert torch.allclose(after.resolvent.weights * after.dual, expected, rtol=1e-12, atol=0)
