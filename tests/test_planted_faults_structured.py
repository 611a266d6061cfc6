"""Faults planted in the structured solvers: for each a law or a test must raise.

One that was looked at is none: a sweep back with the sign of a sweep forward flips rows and columns together, which
no cost sees.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from optprune.problems import Channels
from optprune.solvers import ChannelSwaps, FlapMetric, GreedyObs, Restore, Spap, solve
from optprune.solvers.inverse import InverseForm
from optprune.testing import check_solver
from tests import test_spap
from tests import test_structured_solvers as tests
from tests.structured_cases import channels, grouped_query

greedy_obs = importlib.import_module("optprune.solvers.greedy_obs")
spap = importlib.import_module("optprune.solvers.spap")
tableau = importlib.import_module("optprune.solvers.tableau")

removal_bound = importlib.import_module("optprune.solvers.removal_bound")

remove, cheapest = greedy_obs._Left.remove, greedy_obs._cheapest
sweep, best, worth = tableau._sweep, tableau.Tableau.best_exchange, tableau.Tableau.worth
penalise = spap._penalised
without, eigvalsh = InverseForm.without, torch.linalg.eigvalsh


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
    return greedy_obs._Left(self.inverse[rows][:, rows], self.minimiser[:, rows], self.each)


def no_quota(cost, slots, quota, batch):
    return cheapest(cost, slots, torch.full_like(quota, batch), batch)


def dearest(cost, slots, quota, batch):
    return cheapest(torch.where(cost < torch.inf, -cost, torch.inf), slots, quota, batch)


def not_refitted(self, columns):
    weight = self.minimiser.clone()
    weight[:, columns] = 0
    return weight


def rows_not_swept(matrix, rows, pivots, sign):
    return sweep(matrix, rows, pivots, sign)[0], rows


def worst_exchange(self, candidates, barred=None):
    found = best(self, candidates, barred)
    return None if found is None else replace(found, leaving=self.choice.nonzero()[0, 0])


def any_slot(self, candidates, barred=None):
    one = replace(self.channels, slots=torch.zeros_like(self.channels.slots))
    return best(replace(self, channels=one), candidates, barred)


def last_in_place_of_best(self, problem, state):
    return ChannelSwaps.original(self, problem, replace(state, best=state.tableau.choice))


def halved_penalty(problem, form, strength, choice):
    return penalise(problem, form, strength / 2, choice)


def no_penalty(problem, form, strength, choice):
    return penalise(problem, form, strength * 1e9, choice)


def first_penalty_only(self, problem, state):
    return spap.Status.CONVERGED if state.settled else None


def size_of_the_penalised_column(self):
    """What a dropped unit is worth by its penalised weight: too little to return."""
    weight = self.rows.square().sum(0).reshape(-1, self.each).sum(1)
    return torch.where(self.choice, weight, 0.0)


def no_pairs(state):
    nothing = torch.zeros(0, dtype=torch.long)
    return nothing, nothing


def no_excursion(self, tableau, depth, *, drop_first):
    return None


def uncentred(self, problem):
    return problem.loss.weight.square() * problem.loss.moments.gram.diagonal()


def first_column_only(self, per_column):
    return per_column[self.columns][:, 0]


def half_as_large(matrix):
    return eigvalsh(matrix) / 2


def literal_greedy():
    for seed in (0, 1):
        tests.test_greedy_removes_what_costs_least_after_a_refit_every_time(channels, "mixed", seed)
        tests.test_greedy_removes_what_costs_least_after_a_refit_every_time(grouped_query, "mixed", seed)


def theory():
    for scale in ("inverse", "gram"):
        test_spap.test_the_steps_are_exact_and_at_one_penalty_they_never_rise(channels, "mixed", scale)


def worths():
    test_spap.test_a_unit_is_worth_what_its_absence_costs_and_a_set_the_change_it_makes(channels, "mixed", 10.0)


def settled():
    test_spap.test_where_the_choice_settles_no_exchange_lowers_the_penalised_loss(channels, "mixed")


def near():
    test_spap.test_it_ends_near_the_exhaustive_optimum_and_below_greedy_elimination("low rank")


def many():
    test_spap.test_many_units_change_places_in_one_step()


def laws(solver):
    return lambda: check_solver(solver, examples=40, shrink=False)


def predicted():
    tests.test_a_round_of_swaps_predicts_the_change_of_the_refitted_loss(grouped_query, "mixed")


def kept_when_refitted():
    for kind in tests.KINDS:
        problem = channels(0, kind)
        start = solve(problem, Restore())
        assert solve(problem, ChannelSwaps(), start=start.value).objective <= start.objective * (1 + 1e-9)


FAULTS = {
    "greedy: H not updated": (greedy_obs._Left, "remove", blocks_not_updated, literal_greedy),
    "greedy: V not updated": (greedy_obs._Left, "remove", weights_not_updated, literal_greedy),
    "greedy: the dearest first": (greedy_obs, "_cheapest", dearest, literal_greedy),
    # Losing more than its share is feasible, so the laws do not see it.
    "greedy: slots ignored": (greedy_obs, "_cheapest", no_quota, literal_greedy),
    "greedy: pending updates forgotten": (
        greedy_obs._Left,
        "flushed",
        pending_forgotten,
        lambda: tests.test_the_curve_stays_exact_when_pending_updates_are_carried_out(1),
    ),
    "greedy: not refitted": (InverseForm, "without", not_refitted, literal_greedy),
    "swaps: the weights not swept": (tableau, "_sweep", rows_not_swept, predicted),
    "swaps: another unit leaves": (tableau.Tableau, "best_exchange", worst_exchange, predicted),
    "swaps: exchange between slots": (tableau.Tableau, "best_exchange", any_slot, laws(ChannelSwaps())),
    "swaps: not refitted": (InverseForm, "without", not_refitted, kept_when_refitted),
    "SPAP: penalty halved": (spap, "_penalised", halved_penalty, theory),
    "SPAP: dropped in place of penalised": (spap, "_penalised", no_penalty, theory),
    "SPAP: the penalty does not grow": (spap.Spap, "done", first_penalty_only, theory),
    "SPAP: a unit is worth its penalised size": (tableau.Tableau, "worth", size_of_the_penalised_column, worths),
    "SPAP: no exchange of many units": (spap, "_pairs", no_pairs, many),
    "SPAP: no exchange of two units": (tableau.Tableau, "best_exchange", lambda self, *_: None, settled),
    "SPAP: no excursions": (spap.Spap, "_excursion", no_excursion, near),
    "bound: half the eigenvalue": (
        removal_bound.torch.linalg,
        "eigvalsh",
        half_as_large,
        lambda: [tests.test_the_removal_bound_holds_and_says_something(kind) for kind in tests.KINDS],
    ),
    "FLAP: the mean square for the variance": (
        FlapMetric,
        "scores",
        uncentred,
        tests.test_flap_ranks_by_variance_and_a_bias_replaces_the_means,
    ),
    "units: only their first column counts": (
        Channels,
        "sum_columns",
        first_column_only,
        tests.test_flap_adds_up_over_the_columns_of_a_unit,
    ),
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Figures of a faulty solver must not stay for the tests that follow, nor good ones for the faulty."""
    tests.mean_excess.cache_clear()
    yield
    tests.mean_excess.cache_clear()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    owner, name, what, test = FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError):
        test()


def test_an_answer_that_is_not_the_best_on_the_way_is_noticed(monkeypatch):
    """With depth the last choice is seldom the best one."""
    monkeypatch.setattr(ChannelSwaps, "original", ChannelSwaps.value, raising=False)
    monkeypatch.setattr(ChannelSwaps, "value", last_in_place_of_best)
    with pytest.raises(AssertionError):
        for kind in tests.KINDS:
            tests.test_depth_never_ends_higher_than_plain_exchanges(kind)


def test_without_a_fault_the_laws_hold():
    for solver in (GreedyObs(), ChannelSwaps(), Spap(), FlapMetric()):
        check_solver(solver, examples=8)
    literal_greedy()
    theory()
    predicted()
