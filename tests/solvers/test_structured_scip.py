"""The mixed-integer program of a structured problem, solved by SCIP, against exhaustion and against our solvers."""

import pytest

from optprune.solvers import Chain, ChannelSwaps, GreedyObs, RemovalBound, Restore, solve
from optprune.testing.references import exhaustive, mixed_integer
from tests.helpers.structured_cases import KINDS, channels, grouped_query


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", ["channels", "grouped_query"])
def test_scip_finds_the_exhaustive_optimum(problem, kind):
    seed = KINDS.index(kind)
    made = channels(seed, kind, units=8, keep=4) if problem == "channels" else grouped_query(seed, kind)
    found, best = mixed_integer(made), exhaustive(made)
    # The answer of SCIP is restored by the same reference: where it is not the same choice, it is worse.
    assert best.optimum - best.rounding <= found.optimum <= best.optimum + found.rounding


@pytest.mark.e2e
def test_no_answer_is_below_what_scip_finds_and_no_bound_above():
    problem = channels(3, "mixed", units=10, keep=5)
    best = mixed_integer(problem)
    answer = solve(problem, Chain((GreedyObs(), ChannelSwaps(), Restore())))
    assert answer.objective >= best.optimum - best.rounding
    assert solve(problem, RemovalBound()).certificate.lower_bound <= best.optimum
