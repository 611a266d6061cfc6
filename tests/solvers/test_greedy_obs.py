"""Greedy elimination against literal refits after every removal."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.problems import Channels, StructuredLeastSquares
from optprune.solvers import (
    GreedyObs,
    removal_curve,
    solve,
)
from optprune.solvers.inverse import InverseForm
from optprune.testing.strategies import structured
from tests.helpers.faults import not_refitted, noticed
from tests.helpers.structured_cases import (
    by_kind,
    by_problem,
    channels,
    grouped_query,
    refitted,
    structured_loss,
)


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
    problem = StructuredLeastSquares(structured_loss(3, 5, width), Channels.of(width, size), 1)
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


@given(structured(), st.integers(1, 5))
def test_batches_keep_the_counts(problem, batch):
    solution = solve(problem, GreedyObs(batch))
    assert solution.violation == 0
    assert problem.pattern.admits(problem.support(solution.value))


# -- faults planted: heuristics promise little to the laws, so these tests must notice

greedy_obs = importlib.import_module("optprune.solvers.greedy_obs")
remove, cheapest = greedy_obs._Remaining.remove, greedy_obs._cheapest


def blocks_not_updated(self, units):
    blocks = self.blocks
    cost = remove(self, units)
    self.blocks = blocks
    return cost


def weights_not_updated(self, units):
    grams = self.grams
    cost = remove(self, units)
    self.grams = grams
    return cost


def pending_forgotten(self):
    rows = self.alive.repeat_interleave(self.each)
    return greedy_obs._Remaining(self.inverse[rows][:, rows], self.minimiser[:, rows], self.each)


def no_quota(cost, slots, quota, batch):
    return cheapest(cost, slots, torch.full_like(quota, batch), batch)


def dearest(cost, slots, quota, batch):
    return cheapest(torch.where(cost < torch.inf, -cost, torch.inf), slots, quota, batch)


def literal_greedy():
    for seed in (0, 1):
        test_greedy_removes_what_costs_least_after_a_refit_every_time(channels, "mixed", seed)
        test_greedy_removes_what_costs_least_after_a_refit_every_time(grouped_query, "mixed", seed)


FAULTS = {
    "H not updated": (greedy_obs._Remaining, "remove", blocks_not_updated, literal_greedy),
    "V not updated": (greedy_obs._Remaining, "remove", weights_not_updated, literal_greedy),
    "the dearest first": (greedy_obs, "_cheapest", dearest, literal_greedy),
    # Losing more than its share is feasible, so the laws do not see it.
    "slots ignored": (greedy_obs, "_cheapest", no_quota, literal_greedy),
    "pending updates forgotten": (
        greedy_obs._Remaining,
        "flushed",
        pending_forgotten,
        lambda: test_the_curve_stays_exact_when_pending_updates_are_carried_out(1),
    ),
    "not refitted": (InverseForm, "without", not_refitted, literal_greedy),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
