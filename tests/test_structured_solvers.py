"""Structured solvers against literal implementations, and how near the optimum they end."""

import importlib
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.problems import ChannelGroups, LayerLoss, LinkedLeastSquares, StructuredLeastSquares
from optprune.solvers import (
    Chain,
    ChannelSwaps,
    FaspMetric,
    FlapMetric,
    GreedyObs,
    Magnitude,
    RemovalBound,
    Restore,
    Spap,
    removal_curve,
    solve,
)
from optprune.testing import reference
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import linked, structured
from optprune.testing.transformations import random_feasible
from tests.structured_cases import KINDS, channels, grouped_query, structured_loss, tiny

swaps = importlib.import_module("optprune.solvers.channel_swaps")
FEW = settings(max_examples=max(settings().max_examples // 4, 1))

by_problem = pytest.mark.parametrize("make", [channels, grouped_query])
by_kind = pytest.mark.parametrize("kind", KINDS)


def refitted(problem, choice):
    """The least loss of a choice, by solving the normal equations of the kept columns directly."""
    loss, kept = problem.loss, problem.mask(choice)[0]
    gram, target = loss.gram.double(), loss.target.double()
    weight = torch.zeros_like(target)
    weight[:, kept] = torch.linalg.solve(gram[kept][:, kept], target[:, kept].T).T
    return loss.value(weight)


def admissible(problem):
    """Every admissible choice, [choices, units]."""
    slots = problem.channels.slots
    every = torch.tensor(list(product((False, True), repeat=len(slots))))
    counts = torch.stack([every[:, slots == slot].sum(1) for slot in slots.unique()], 1)
    return every[(counts == problem.pattern.keep).all(1)]


# -- greedy elimination


@by_problem
@by_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_removes_what_costs_least_after_a_refit_every_time(make, kind, seed):
    problem = make(seed, kind)
    slots, keep = problem.channels.slots, problem.pattern.keep
    choice = torch.ones_like(slots, dtype=torch.bool)
    while True:
        may_lose = [u for u in choice.nonzero()[:, 0].tolist() if int(choice[slots == slots[u]].sum()) > keep]
        if not may_lose:
            break
        trials = {}
        for unit in may_lose:
            trial = choice.clone()
            trial[unit] = False
            trials[unit] = refitted(problem, trial)
        choice[min(trials, key=lambda unit: trials[unit])] = False
    solution = solve(problem, GreedyObs())
    assert torch.equal(problem.support(solution.value), choice)
    assert solution.objective == pytest.approx(refitted(problem, choice), rel=1e-9)


@by_problem
@pytest.mark.parametrize("seed", [0, 1])
def test_the_removal_curve_is_the_loss_refitted_after_every_removal(make, seed):
    problem = make(seed, "mixed")
    order, cost, _ = removal_curve(problem)
    assert sorted(order.tolist()) == list(range(problem.channels.units))
    choice, slots = torch.ones(len(order), dtype=torch.bool), problem.channels.slots
    for removed, unit in enumerate(order.tolist()):
        choice[unit] = False
        assert float(cost[removed]) == pytest.approx(refitted(problem, choice), rel=1e-9)
        if (removed + 1) % problem.channels.slot_count == 0:
            counts = torch.bincount(slots[choice], minlength=problem.channels.slot_count)
            assert bool((counts == counts[0]).all())


@pytest.mark.parametrize("size", [1, 3])
def test_the_curve_stays_exact_when_pending_updates_are_carried_out(size):
    width = 180
    problem = StructuredLeastSquares(structured_loss(3, 5, width), ChannelGroups.of(width, size), 1)
    order, cost, _ = removal_curve(problem)
    for removed in (1, 20, width // size // 2, width // size - 2):
        choice = torch.ones(width // size, dtype=torch.bool)
        choice[order[:removed]] = False
        assert float(cost[removed - 1]) == pytest.approx(refitted(problem, choice), rel=1e-8)


def test_one_slot_is_removed_in_the_order_of_its_curve():
    problem = channels(0, "mixed")
    order, _, _ = removal_curve(problem)
    kept = problem.support(solve(problem, GreedyObs()).value)
    assert sorted(order[:6].tolist()) == (~kept).nonzero()[:, 0].tolist()


@given(st.one_of(linked(), structured()), st.integers(1, 5))
def test_batches_keep_the_counts(problem, batch):
    solution = solve(problem, GreedyObs(batch))
    assert solution.violation == 0
    assert problem.pattern.admits(problem.support(solution.value))


# -- swaps


@by_problem
@by_kind
def test_a_round_of_swaps_predicts_the_change_of_the_refitted_loss(make, kind):
    problem, solver = make(2, kind), ChannelSwaps(depth=3)
    state = solver.init(problem, random_feasible(problem, 0))
    for _ in range(5):
        found = state.tableau.best_exchange(32, state.moved)
        before = refitted(problem, state.tableau.choice)
        state = solver.step(problem, state)
        if state.finished:
            break
        # Both sides are differences of losses of this size.
        after = refitted(problem, state.tableau.choice)
        assert found.change == pytest.approx(after - before, abs=1e-10 * before)


@by_problem
@by_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_where_swaps_stop_no_exchange_gains(make, kind, seed):
    problem = make(seed, kind)
    choice = problem.support(solve(problem, ChannelSwaps(depth=0)).value)
    here = refitted(problem, choice)
    for other in admissible(problem):
        if int((other ^ choice).sum()) == 2:
            assert refitted(problem, other) >= here * (1 - 2e-6)


def test_a_refreshed_tableau_is_the_updated_one(monkeypatch):
    problem = channels(1, "mixed")
    usual = solve(problem, ChannelSwaps(depth=5)).value
    monkeypatch.setattr(swaps, "REFRESH", 1)
    assert torch.allclose(solve(problem, ChannelSwaps(depth=5)).value, usual, rtol=1e-9, atol=1e-12)


@FEW
@given(st.one_of(linked(), structured()), st.integers(0, 5))
def test_swaps_never_worsen_a_refitted_start(problem, seed):
    start = solve(problem, Restore(), start=random_feasible(problem, seed))
    for depth in (0, 4):
        end = solve(problem, ChannelSwaps(depth=depth), start=start.value)
        slack = rounding(problem.loss, start.value) + rounding(problem.loss, end.value)
        assert end.objective <= start.objective + slack


# -- FLAP and magnitude


def test_flap_ranks_by_variance_and_a_bias_replaces_the_means():
    # The second input is large and constant, the first varies: without its mean only the first counts.
    inputs = torch.tensor([[1.0, 9.0], [-1.0, 9.0], [1.0, 9.0], [-1.0, 9.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for fit_bias, error in ((True, 0.0), (False, 18.0**2 / 2)):
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), fit_bias=fit_bias)
        problem = StructuredLeastSquares(loss, ChannelGroups.of(2), 1)
        solution = solve(problem, FlapMetric())
        assert solution.value.tolist() == [[1.0, 0.0]]
        assert solution.objective == pytest.approx(error)
        assert solve(problem, FaspMetric()).value.tolist() == [[0.0, 2.0]]
    assert loss.bias_change(solution.value).tolist() == [18.0]


def test_flap_adds_up_over_the_columns_of_a_unit():
    problem = grouped_query(0, "mixed")
    loss = problem.loss
    variance = loss.moments.gram.diagonal() - loss.moments.mean.square()
    score = (loss.weight.square().sum(0) * variance).square()[problem.channels.columns].sum(1)
    assert torch.equal(problem.support(solve(problem, FlapMetric()).value), problem.pattern.project(score))


def test_flap_squares_the_columns_of_a_head_before_it_adds_them_up():
    # Two heads whose columns fluctuate by 3 and 3, and by 5 and 0: 6 > 5, but 9 + 9 < 25 + 0.
    moments = InputMoments(torch.eye(4), torch.zeros(4), 50)
    weight = torch.tensor([[3.0, 3.0, 5.0, 0.0]]).sqrt()
    problem = StructuredLeastSquares(LayerLoss.of(weight, moments), ChannelGroups.of(4, 2), 1)
    assert solve(problem, FlapMetric()).value.nonzero()[:, 1].tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flap_ranks_by_variance_where_means_are_large(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=generator) * torch.linspace(0.05, 0.1, 12) + 100
    weight = torch.randn(4, 12, generator=generator)
    literal = weight.double().square().sum(0) * inputs.double().var(0)
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs.to(dtype)), 0.01, fit_bias=True)
    problem = StructuredLeastSquares(loss, ChannelGroups.of(12), 6)
    found = problem.support(solve(problem, FlapMetric()).value)
    assert found.nonzero()[:, 0].tolist() == literal.topk(6).indices.sort().values.tolist()
    assert solve(problem, GreedyObs()).violation == 0


# -- problems


def test_groups_are_where_they_are_asked_for_whatever_the_default_device():
    with torch.device("meta"):
        groups = ChannelGroups.of(6, 3), ChannelGroups.of(6, 3, torch.device("cpu"))
    assert all(part.device.type == "cpu" for group in groups for part in (group.columns, group.slots))


def test_groups_are_cut_and_checked():
    assert ChannelGroups.of(6, 3).columns.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="cannot be cut"):
        ChannelGroups.of(6, 4)
    loss = structured_loss(0, 2, 4)
    with pytest.raises(InputError, match="but the layer has 4"):
        StructuredLeastSquares(loss, ChannelGroups.of(6), 2)
    with pytest.raises(InputError, match="cannot keep"):
        StructuredLeastSquares(loss, ChannelGroups.of(4), 0)


@given(linked())
def test_a_linked_problem_is_the_structured_one_of_its_consumer(problem):
    groups = ChannelGroups(problem.link.columns, problem.link.slots)
    other = StructuredLeastSquares(problem.loss, groups, problem.keep)
    for solver in (Magnitude(), GreedyObs(), Spap(), ChannelSwaps()):
        assert torch.equal(solve(problem, solver).value, solve(other, solver).value)


# -- how near the optimum


@cache
def optima(kind):
    """The 18 instances of a kind with their exhaustive optima."""
    return [(problem, reference(problem).optimum) for problem in tiny(kind)]


@cache
def mean_excess(solver, kind):
    """The mean of objective / optimum - 1; no answer may be below the optimum."""
    shares = [solve(problem, solver).objective / best - 1 for problem, best in optima(kind)]
    assert min(shares) >= -1e-9
    assert any(isinstance(problem, LinkedLeastSquares) for problem, _ in optima(kind))
    return sum(shares) / len(shares)


# Mean excess over the optimum, in percent: a ceiling above what was measured on this set, and next to it what was.
# Greedy elimination ends at 0.3, 4.8 and 4.4.
STATED = {
    ("spap", "independent"): (0.5, 0.00),
    ("spap", "mixed"): (0.5, 0.00),
    ("spap", "low rank"): (0.5, 0.00),
    ("spap_plus", "independent"): (0.5, 0.00),
    ("spap_plus", "mixed"): (0.5, 0.00),
    ("spap_plus", "low rank"): (0.5, 0.02),
}
CHAINS = {"spap": Chain((Spap(), Restore())), "spap_plus": Chain((GreedyObs(), ChannelSwaps(), Restore()))}


@pytest.mark.parametrize(("name", "kind"), STATED)
def test_answers_end_near_the_exhaustive_optimum(name, kind):
    assert 100 * mean_excess(CHAINS[name], kind) <= STATED[name, kind][0]


@by_kind
def test_depth_never_ends_higher_than_plain_exchanges(kind):
    for problem, _ in optima(kind):
        start = solve(problem, GreedyObs()).value
        plain, deep = (solve(problem, ChannelSwaps(depth=depth), start=start).objective for depth in (0, 8))
        assert deep <= plain * (1 + 1e-9)


@by_kind
def test_the_removal_bound_holds_and_says_something(kind):
    gaps = []
    for problem, best in optima(kind):
        bound = solve(problem, RemovalBound()).certificate.lower_bound
        assert 0 <= bound <= best * (1 + 1e-9)
        gaps.append(1 - bound / best)
    # Measured: 30, 69 and 49 percent of the optimum are left unproved; the perspective bound leaves 93 and more.
    assert sum(gaps) / len(gaps) <= 0.75


@given(st.one_of(linked(), structured()), st.integers(0, 10))
def test_the_bound_of_every_choice_is_below_its_refitted_loss(problem, seed):
    bound = solve(problem, RemovalBound()).certificate.lower_bound
    solution = solve(problem, Restore(), start=random_feasible(problem, seed))
    assert bound <= solution.objective * (1 + 1e-8) + rounding(problem.loss, solution.value)


def test_the_bound_is_the_optimum_where_inputs_are_independent():
    moments = InputMoments(torch.diag(torch.tensor([1.0, 4.0, 9.0, 1.0])).double(), torch.zeros(4).double(), 50)
    loss = LayerLoss.of(torch.tensor([[3.0, 1.0, 1.0, 0.5]]).double(), moments)
    solution = solve(StructuredLeastSquares(loss, ChannelGroups.of(4), 2), RemovalBound())
    # The two cheapest: 4 x 1 and 1 x 0.25, halved.
    assert solution.certificate.lower_bound == pytest.approx(4.25 / 2, rel=1e-9)


def test_hypothesis_draws_are_solved_to_the_stated_shares():
    """Generic draws of up to 12 units: with and without biases, dense inputs, ties of two columns, two slots."""
    excess = {name: [] for name in CHAINS}

    @settings(max_examples=60)
    @given(st.one_of(linked(generic=True, most=12), structured(generic=True, most=12)))
    def check(problem):
        best = reference(problem)
        for name, solver in CHAINS.items():
            above = max(solve(problem, solver).objective - best.optimum - best.rounding, 0.0)
            excess[name].append(above / best.optimum if above else 0.0)

    check()
    mean = {name: sum(shares) / len(shares) for name, shares in excess.items()}
    # What must be shown; measured: 0.00 and 0.06 percent.
    assert mean["spap"] <= 0.005
    assert mean["spap_plus"] <= 0.005


def test_a_refit_of_one_choice_proves_nothing_of_the_best():
    assert solve(channels(0, "mixed"), Restore()).certificate is None
