"""Exchanges of units: their changes, measured, and what is left when they stop."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.problems import Channels, StructuredLeastSquares
from optprune.solvers import ChannelSwaps, Restore, solve
from optprune.solvers.inverse import INACCURATE
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import structured
from optprune.testing.transformations import random_feasible
from tests.helpers.faults import noticed
from tests.helpers.sparse_cases import nearly_repeated
from tests.helpers.structured_cases import admissible, by_kind, by_problem, channels, grouped_query, refitted

swaps = importlib.import_module("optprune.solvers.channel_swaps")
FEW = settings(max_examples=max(settings().max_examples // 4, 1))


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
@given(structured(), st.integers(0, 5))
def test_swaps_never_worsen_a_refitted_start(problem, seed):
    start = solve(problem, Restore(), start=random_feasible(problem, seed))
    for depth in (0, 4):
        end = solve(problem, ChannelSwaps(depth=depth), start=start.value)
        slack = rounding(problem.loss, start.value) + rounding(problem.loss, end.value)
        assert end.objective <= start.objective + slack


def test_inputs_that_nearly_repeat_each_other_are_noted_and_nothing_gets_worse():
    for seed in range(3):
        problem = StructuredLeastSquares(nearly_repeated(1e-6, seed), Channels.of(12, 1), 4)
        start = solve(problem, Restore())
        found = solve(problem, ChannelSwaps(), start=start.value)
        assert found.notes == (INACCURATE,)
        assert found.objective <= start.objective


# -- faults planted: heuristics promise little to the laws, so these tests must notice

tableau = importlib.import_module("optprune.solvers.inverse")
sweep, best = tableau._sweep, tableau.Tableau.best_exchange


def rows_not_swept(matrix, rows, pivots, sign):
    return sweep(matrix, rows, pivots, sign)[0], rows


def worst_exchange(self, candidates, barred=None):
    found = best(self, candidates, barred)
    return None if found is None else replace(found, leaving=self.choice.nonzero()[0])


def predicted():
    test_a_round_of_swaps_predicts_the_change_of_the_refitted_loss(grouped_query, "mixed")


FAULTS = {
    "the weights not swept": (tableau, "_sweep", rows_not_swept, predicted),
    "another unit leaves": (tableau.Tableau, "best_exchange", worst_exchange, predicted),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
