"""FISTA: it reaches the optimum on ill-conditioned matrices, and its certificate never claims more than the optimum."""

from dataclasses import dataclass
from typing import final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.errors import NumericalError
from optprune.moments import InputMoments
from optprune.penalties import L1, NormPenalty, Penalty
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers import Fista, Status, solve
from optprune.solvers.duality import DualMap
from optprune.solvers.run import CONTRADICTED
from optprune.solvers.spectrum import column_scale, largest_eigenvalue_bound
from optprune.testing import reference
from optprune.testing.quadratic import exact_objective, rounding
from optprune.testing.references import PENALISED_ACCURACY
from optprune.testing.strategies import penalised
from tests.helpers.barely_apart import barely_apart
from tests.helpers.convex_cases import (
    MOST_STEPS,
    PENALTY_NAMES,
    ROWS,
    WIDTH,
    assert_reaches_the_optimum,
    ill_conditioned,
    penalty_of,
)
from tests.helpers.faults import noticed, unclipped

FEWER = settings(max_examples=max(settings().max_examples // 2, 1))


@pytest.mark.parametrize("dense", [False, True], ids=["same inputs", "dense inputs"])
@pytest.mark.parametrize("share", [1e-3, 0.1])
@pytest.mark.parametrize("kind", PENALTY_NAMES)
def test_reaches_the_convex_optimum_on_condition_1e8(kind, share, dense):
    assert_reaches_the_optimum(Fista(), kind, share, dense)


def arbitrary_weights(problem, seed):
    """Weights that no solver would visit: zero, the original, noise of several sizes, and some way off a solution."""
    generator = torch.Generator().manual_seed(seed)
    weight = problem.loss.weight
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    near = solve(problem, Fista(), max_steps=50).value
    yield from (torch.zeros_like(weight), weight, near)
    for size in (1e-6, 1e-2, 1.0, 1e3):
        yield size * noise
        yield near + size * noise


def least_loss(dual):
    """The weight with the least loss, without its penalty."""
    return dual.verified.weight + dual.minimiser


@given(penalised(), st.integers(0, 100))
def test_a_bound_from_any_weight_is_a_bound(problem, seed):
    best, dual = reference(problem), DualMap.of(problem)
    for weight in arbitrary_weights(problem, seed):
        bound = dual.bound(weight)
        # The bound is a difference of terms of the size of the loss at that weight, or at the minimiser.
        terms = rounding(problem.loss, weight) + rounding(problem.loss, least_loss(dual))
        assert 0 <= bound <= best.optimum + best.rounding + terms, f"from {weight.tolist()}"


@given(penalised(dtype=torch.float32))
def test_a_bound_from_any_float32_weight_is_a_bound(problem):
    best, dual = reference(problem), DualMap.of(problem)
    for weight in arbitrary_weights(problem, 0):
        terms = rounding(problem.loss, weight) + rounding(problem.loss, least_loss(dual))
        assert 0 <= dual.bound(weight.float()) <= best.optimum + best.rounding + terms


@pytest.mark.parametrize("width", [32, 300])
def test_bounds_hold_where_inputs_come_in_different_units(width):
    """float32, undamped, half of the inputs a thousand times smaller, dense inputs that differ; well conditioned."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    unit = torch.where(torch.arange(width) < width // 2, 1.0, 1e-3).double()
    inputs = normal(4 * width, width) * unit
    moments = InputMoments.from_samples(inputs, inputs + 0.3 * normal(4 * width, width)).to(torch.float32)
    loss = LayerLoss.of(normal(4, width), moments)
    # A penalty next to nothing, so that the loss at its own minimiser bounds the optimum from above.
    problem = PenalisedLeastSquares(loss, L1(1e-9))
    dual = DualMap.of(problem)
    assert dual.bend == 0
    least = torch.linalg.solve(loss.gram.double(), loss.target.double().T).T
    best = problem.objective(least)
    for weight in (loss.weight, torch.zeros_like(loss.weight), least):
        assert dual.bound(weight) <= best + rounding(loss, least)
    assert dual.bound(least) == pytest.approx(best, rel=1e-4)


def test_a_diagonal_gram_of_condition_100_is_regular():
    gram = torch.diag(torch.logspace(0, -2, 300))
    loss = LayerLoss.of(torch.ones(1, 300), InputMoments(gram, torch.zeros(300), 1000))
    assert DualMap.of(PenalisedLeastSquares(loss, L1(1e-3))).bend == 0


def test_a_curvature_below_the_rounding_of_the_dtype_counts_as_it_is_stored():
    loss = barely_apart()
    problem = PenalisedLeastSquares(loss, L1(1e-9))
    dual = DualMap.of(problem)
    better = torch.linalg.solve(loss.gram.double(), loss.target.double().T).T
    best = exact_objective(problem, better)
    for weight in (loss.weight, torch.zeros_like(loss.weight), least_loss(dual), better):
        assert dual.bound(weight) <= best
    assert dual.bound(better) >= 0.999 * best


def test_a_contradicted_bound_is_no_convergence(monkeypatch):
    loss = ill_conditioned(1, dense=True)
    problem = PenalisedLeastSquares(loss, penalty_of("l1", loss, 0.1))
    best = solve(problem, Fista()).objective
    monkeypatch.setattr(DualMap, "bound", lambda self, weight: 1.01 * best)
    solution = solve(problem, Fista())
    assert solution.status is not Status.CONVERGED
    assert solution.certificate is None
    assert solution.gap is None
    assert solution.notes[0].startswith(CONTRADICTED)


@FEWER
@given(penalised(generic=True))
def test_the_bound_closes_to_the_tolerance(problem):
    solution = solve(problem, Fista(1e-9))
    slack = rounding(problem.loss, solution.value) + rounding(problem.loss, least_loss(DualMap.of(problem)))
    # The bound may come from another iterate than the best weight, whose own is a square root of the gap away.
    assert solution.certificate is not None
    assert solution.objective - solution.certificate.lower_bound <= 1e-9 * solution.objective + slack


@FEWER
@given(penalised())
def test_a_warm_start_at_the_answer_stops_at_once(problem):
    first = solve(problem, Fista(1e-9), max_steps=MOST_STEPS)
    again = solve(problem, Fista(1e-6), start=first.value)
    # What the answer alone proves: the solver's own bound may come from another of its iterates.
    proved = first.objective - DualMap.of(problem).bound(first.value) <= 1e-6 * abs(first.objective)
    assert (again.steps == 0) == proved
    assert again.steps <= first.steps
    if proved:
        assert torch.equal(again.value, first.value)
    assert again.objective <= first.objective


@pytest.mark.e2e
@FEWER
@given(penalised(), st.integers(0, 100))
def test_perturbing_the_answer_never_improves_it(problem, seed):
    solution = solve(problem, Fista(1e-9), max_steps=MOST_STEPS)
    generator = torch.Generator().manual_seed(seed)
    shape = solution.value.shape
    for size in (1e-4, 1e-2, 1.0):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        single = torch.zeros(shape, dtype=torch.float64)
        single.view(-1)[int(torch.randint(0, single.numel(), (), generator=generator))] = 1.0
        for change in (noise, single, -single, solution.value):
            other = solution.value + size * change
            slack = rounding(problem.loss, solution.value) + rounding(problem.loss, other)
            # Twice what Fista promises: a gap of 1e-6 at most, and usually 1e-9.
            assert problem.objective(other) >= solution.objective * (1 - 2e-6) - slack


@final
@dataclass(frozen=True)
class Box(NormPenalty):
    """A user's norm: the largest absolute value of each row, summed; its dual norm is the largest row sum."""

    strength: float

    def value(self, weight):
        return self.strength * float(weight.double().abs().amax(1).sum())

    def prox(self, weight, step):
        # By Moreau: V minus the projection of V onto the l1 ball of radius strength * step, row by row.
        radius = self.strength * step
        ordered = weight.abs().sort(1, descending=True).values
        excess = ordered.cumsum(1) - radius
        count = torch.arange(1, weight.shape[1] + 1, dtype=weight.dtype)
        active = (ordered * count > excess).sum(1, keepdim=True).clamp(min=1)
        threshold = (excess.gather(1, active - 1) / active).clamp(min=0)
        inside = weight.abs().sum(1, keepdim=True) <= radius
        return torch.where(inside, 0.0, weight.clamp(-threshold, threshold))

    def dual_norm(self, dual):
        return float(dual.double().abs().sum(1).max()) / self.strength


@final
@dataclass(frozen=True)
class Huber(Penalty):
    """A user's smooth penalty that is no norm: v^2 / 2 near zero and |v| - 1/2 away from it, strength times."""

    strength: float

    def value(self, weight):
        size = weight.double().abs()
        return self.strength * float(torch.where(size <= 1, size.square() / 2, size - 0.5).sum())

    def prox(self, weight, step):
        pull = self.strength * step
        return torch.where(weight.abs() <= 1 + pull, weight / (1 + pull), weight - pull * weight.sign())

    def conjugate(self, dual):
        scaled = dual.double() / self.strength
        # Up to rounding, as for norms.
        if float(scaled.abs().max()) > 1 + 1e-12:
            return float("inf")
        return self.strength * float(scaled.square().sum()) / 2


@pytest.mark.parametrize("share", [1e-2, 0.3])
@pytest.mark.parametrize("kind", [Box, Huber])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_penalty_of_the_users_own_works_unchanged(kind, share, damping):
    loss = ill_conditioned(2, dense=True).damped(damping)
    problem = PenalisedLeastSquares(loss, kind(share * float(loss.target.abs().sum(1).max())))
    solution = solve(problem, Fista(), max_steps=MOST_STEPS)
    assert solution.status is Status.CONVERGED
    assert solution.gap <= 1e-6
    # The certificate is ours; that no weight is better is not.
    generator = torch.Generator().manual_seed(0)
    for size in (1e-6, 1e-3, 1e-1):
        for _ in range(50):
            other = solution.value + size * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
            assert problem.objective(other) >= solution.objective * (1 - 1e-6)


@pytest.mark.e2e
def test_options_do_not_change_the_optimum():
    loss = ill_conditioned(3, dense=False).damped(1e-3)
    problem = PenalisedLeastSquares(loss, penalty_of("l1", loss, 0.05))
    best = reference(problem).optimum
    for scale_columns in (False, True):
        for restart in (False, True):
            solver = Fista(1e-7, scale_columns=scale_columns, restart=restart)
            found = solve(problem, solver, max_steps=MOST_STEPS).objective
            assert found == pytest.approx(best, rel=1e-6 + PENALISED_ACCURACY)


def test_above_the_largest_strength_zero_is_the_answer_and_proved():
    loss = ill_conditioned(4, dense=True)
    for kind in ("l1", "column groups"):
        problem = PenalisedLeastSquares(loss, penalty_of(kind, loss, 1.001))
        solution = solve(problem, Fista())
        assert not bool(solution.value.any())
        assert solution.gap <= 1e-6
        below = PenalisedLeastSquares(loss, penalty_of(kind, loss, 0.95))
        assert bool(solve(below, Fista(), max_steps=MOST_STEPS).value.any())


def test_nan_in_the_gram_is_an_error():
    gram = torch.eye(2)
    gram[0, 1] = gram[1, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        PenalisedLeastSquares(LayerLoss.of(torch.ones(1, 2), InputMoments(gram, torch.zeros(2), 9)), L1(1.0))


def test_dead_inputs_and_no_signal():
    moments = InputMoments(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 9)
    problem = PenalisedLeastSquares(LayerLoss.of(torch.ones(2, 3), moments), L1(0.5))
    solution = solve(problem, Fista())
    assert solution.objective == 0
    assert solution.status is Status.CONVERGED
    assert not bool(solution.value.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(problem=penalised())
def test_the_step_is_safe_and_not_much_too_short(problem, dtype):
    gram = problem.loss.gram.to(dtype)
    for matrix in (gram, gram / torch.outer(column_scale(gram), column_scale(gram))):
        largest = float(torch.linalg.eigvalsh(matrix.double())[-1])
        bound = largest_eigenvalue_bound(matrix)
        assert bound >= largest
        # n^(1/m) with m = 32 and n at most 7.
        assert bound <= 7 ** (1 / 32) * 1.001 * largest


@dataclass(frozen=True)
class Nothing(Penalty):
    """No penalty at all, whose proximal point is its very argument."""

    def value(self, weight):
        return 0.0

    def prox(self, weight, step):
        return weight

    def conjugate(self, dual):
        return 0.0 if bool((dual == 0).all()) else float("inf")


def test_a_penalty_may_hand_back_the_array_it_was_given():
    loss = ill_conditioned(3, dense=True)
    start = torch.zeros_like(loss.weight)
    plain = Fista(scale_columns=False)
    handed = plain.iterate(PenalisedLeastSquares(loss, Nothing()), start, 30)
    copied = plain.iterate(PenalisedLeastSquares(loss, L1(0.0)), start, 30)
    assert torch.equal(handed, copied)
    assert torch.equal(start, torch.zeros_like(start))


FAULTS = {
    "certificate not clipped": (DualMap, "_projected", unclipped, test_a_bound_from_any_weight_is_a_bound),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
