"""Faults planted in the structured solvers: for each a law or a test must raise.

One that was looked at is none: a sweep back with the sign of a sweep forward flips rows and columns together, which
no cost sees.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from optprune.problems import Channels
from optprune.solvers import ChannelSwaps, FlapMetric, GreedyObs, Spap
from optprune.solvers.inverse import InverseForm
from optprune.testing import check_solver
from tests import test_structured_solvers as tests
from tests.structured_cases import channels, grouped_query

greedy_obs = importlib.import_module("optprune.solvers.greedy_obs")
swaps = importlib.import_module("optprune.solvers.channel_swaps")
spap = importlib.import_module("optprune.solvers.spap")

removal_bound = importlib.import_module("optprune.solvers.removal_bound")

remove, cheapest = greedy_obs._Left.remove, greedy_obs._cheapest
sweep, best = swaps._sweep, swaps._best
penalised_minimiser, choose = spap.penalised_minimiser, spap._cheapest_penalty
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


def rows_not_swept(tableau, rows, pivots, sign):
    return sweep(tableau, rows, pivots, sign)[0], rows


def worst_exchange(problem, state, candidates):
    found = best(problem, state, candidates)
    return None if found is None else replace(found, leaving=state.choice.nonzero()[0, 0])


def any_slot(problem, state, candidates):
    one = replace(problem.channels, slots=torch.zeros_like(problem.channels.slots))
    blind = replace(problem, link=one) if hasattr(problem, "link") else replace(problem, groups=one)
    return best(blind, state, candidates)


def last_in_place_of_best(self, problem, state):
    return ChannelSwaps.original(self, problem, replace(state, best=state.choice))


def halved_penalty(problem, form, strength, choice):
    return penalised_minimiser(problem, form, strength / 2, choice)


def fixed_diagonal(problem, form, strength, choice):
    return penalised_minimiser(problem, form, strength, choice)[0], form.inverse.diagonal()


def smallest_kept(problem, keep, scale, weight):
    return choose(problem, keep, -scale, weight)


def unscaled(problem, keep, scale, weight):
    return choose(problem, keep, torch.ones_like(scale), weight)


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
        tests.test_the_steps_of_spap_are_exact_and_at_one_penalty_it_never_rises(channels, "mixed", scale, 1)


def laws(solver):
    return lambda: check_solver(solver, examples=40, shrink=False)


def predicted():
    tests.test_a_round_of_swaps_predicts_the_change_of_the_refitted_loss(grouped_query, "mixed")


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
    "swaps: the weights not swept": (swaps, "_sweep", rows_not_swept, predicted),
    "swaps: another unit leaves": (swaps, "_best", worst_exchange, predicted),
    "swaps: exchange between slots": (swaps, "_best", any_slot, laws(ChannelSwaps())),
    "swaps: not refitted": (InverseForm, "without", not_refitted, laws(ChannelSwaps())),
    "SPAP: penalty halved": (spap, "penalised_minimiser", halved_penalty, theory),
    "SPAP: the smallest kept": (spap, "_cheapest_penalty", smallest_kept, theory),
    "SPAP: choice without the scale": (spap, "_cheapest_penalty", unscaled, theory),
    "SPAP: the scale does not follow": (
        spap,
        "penalised_minimiser",
        fixed_diagonal,
        lambda: tests.test_answers_end_near_the_exhaustive_optimum("spap", "mixed"),
    ),
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
