"""Faults planted in the structured solvers: for each a law must raise.

What only a solver's own tests can notice is planted beside them. One fault that was looked at is none: a sweep back
with the sign of a sweep forward flips rows and columns together, which no cost sees.
"""

from dataclasses import replace

import pytest
import torch

from optprune.solvers import ChannelSwaps, FlapMetric, GreedyObs, Restore, Spap, solve
from optprune.solvers.inverse import InverseForm, Tableau
from optprune.testing import check_solver
from tests.helpers.faults import not_refitted, noticed
from tests.helpers.structured_cases import KINDS, channels

best = Tableau.best_exchange


def any_slot(self, candidates, barred=None):
    one = replace(self.channels, slots=torch.zeros_like(self.channels.slots))
    return best(replace(self, channels=one), candidates, barred)


def keep_what_is_refitted():
    for kind in KINDS:
        start = solve(channels(0, kind), Restore())
        assert solve(channels(0, kind), ChannelSwaps(), start=start.value).objective <= start.objective * (1 + 1e-9)


FAULTS = {
    "swaps: exchange between slots": (
        Tableau,
        "best_exchange",
        any_slot,
        lambda: check_solver(ChannelSwaps(), examples=40, shrink=False),
    ),
    "swaps: not refitted": (InverseForm, "without", not_refitted, keep_what_is_refitted),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])


@pytest.mark.slow
def test_without_a_fault_the_laws_hold():
    for solver in (GreedyObs(), ChannelSwaps(), Spap(), FlapMetric()):
        check_solver(solver, examples=8)
