"""RefittedSwaps: every exchange and its change with the row refitted, and what is left when they stop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    RefittedSwaps,
    Restore,
    Status,
    Swaps,
    refitted_swaps,
    solve,
)
from optprune.solvers.inverse import INACCURATE
from optprune.solvers.refitted_swaps import Batch, Search
from optprune.testing import laws
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import sparse
from optprune.testing.transformations import random_feasible
from tests.helpers.faults import noticed
from tests.helpers.sparse_cases import by_pattern, correlated, nearly_repeated


def refitted(problem, mask):
    """The loss of a mask with its weights refitted."""
    return solve(problem.restrict(mask), Restore()).objective


def exchanges(problem, mask, i):
    """(change, leaving, entering) of every exchange that the pattern allows within a row, measured."""
    before, width = refitted(problem, mask), mask.shape[1]
    for p in range(width):
        for q in range(width):
            together = not isinstance(problem.pattern, NM) or p // problem.pattern.m == q // problem.pattern.m
            if together and bool(mask[i, p]) and not bool(mask[i, q]):
                other = mask.clone()
                other[i, p], other[i, q] = False, True
                yield refitted(problem, other) - before, p, q


def moves(problem, mask):
    """The change of every move of a weight from one row to another, measured."""
    before, rows = refitted(problem, mask), len(mask)
    for giver in range(rows):
        for taker in range(rows):
            for p in mask[giver].nonzero()[:, 0].tolist():
                for q in (~mask[taker]).nonzero()[:, 0].tolist():
                    if giver != taker:
                        other = mask.clone()
                        other[giver, p], other[taker, q] = False, True
                        yield refitted(problem, other) - before


def batch_of(problem, mask):
    state = RefittedSwaps().init(problem, problem.start())
    return Batch.of(replace(state, mask=mask.clone()), torch.arange(len(mask)), 0.0, 0.0)


def search_of(problem, candidates=32):
    return Search(candidates, group=problem.pattern.exchanges().group)


@by_pattern
@pytest.mark.parametrize("seed", range(3))
def test_the_best_exchange_of_every_row_is_found_and_its_change_is_exact(pattern, seed):
    problem = correlated(seed, 3, 8, pattern)
    mask = problem.support(random_feasible(problem, seed))
    change, leaving, entering = batch_of(problem, mask).best(search_of(problem))
    for i in range(3):
        literal = min(exchanges(problem, mask, i))
        assert float(change[i]) == pytest.approx(literal[0], abs=1e-9)
        assert (int(leaving[i]), int(entering[i])) == literal[1:]


@by_pattern
def test_a_tableau_after_exchanges_is_the_one_from_scratch(pattern):
    problem = correlated(0, 4, 16, pattern)
    mask = problem.support(random_feasible(problem, 0))
    batch = batch_of(problem, mask)
    state = RefittedSwaps().init(problem, problem.start())
    # Every exchange counts as one that gains.
    batch.threshold = batch.threshold - torch.inf
    for _ in range(12):
        batch.exchange(state, search_of(problem))
    assert len(batch.rows) == 4
    anew = batch_of(problem, batch.mask)
    assert torch.allclose(batch.tableau[:, :-1, :-1], anew.tableau[:, :-1, :-1], rtol=1e-8, atol=1e-8)
    value = solve(problem.restrict(batch.mask), Restore()).value
    assert torch.allclose(batch.weights(), value, rtol=0, atol=1e-8)
    assert not torch.equal(batch.mask, mask)


def test_candidates_are_the_cheapest_and_the_most_gainful():
    """With one candidate of each kind, the exchange is between these two."""
    problem = correlated(1, 5, 16, "rows")
    mask = problem.support(random_feasible(problem, 1))
    batch = batch_of(problem, mask)
    cost, gain = batch.worth()
    _, leaving, entering = batch.best(Search(1))
    assert torch.equal(leaving, cost.argmin(1)) and torch.equal(entering, gain.argmax(1))


@given(sparse())
def test_no_exchange_is_left_that_gains_when_it_stops(problem):
    solution = solve(problem, RefittedSwaps())
    assert solution.status is Status.CONVERGED
    if not laws.clearly_regular(problem.loss):
        return  # the refit is one of a slightly different loss
    mask = problem.support(solution.value)
    slack = 4 * rounding(problem.loss, solution.value) + 1e-5 * solution.objective + problem.loss.constant * 1e-11
    for i in range(mask.shape[0]):
        for change, p, q in exchanges(problem, mask, i):
            assert change >= -slack, f"row {i}: {p} for {q} gains {-change}"


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.e2e), pytest.param(3, marks=pytest.mark.e2e)])
def test_no_move_between_two_rows_is_left_that_gains(seed):
    problem = correlated(seed, 4, 8, "unstructured")
    solution = solve(problem, RefittedSwaps(tolerance=1e-12))
    assert min(moves(problem, problem.support(solution.value))) >= -1e-9 * problem.loss.constant


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.e2e), pytest.param(2, marks=pytest.mark.e2e)])
def test_wherever_it_stops_the_answer_is_feasible_and_no_worse(seed, monkeypatch):
    # One row at a time, so that it stops between rows that exchange weights.
    monkeypatch.setattr(refitted_swaps, "BATCH_BYTES", 1)
    problem = correlated(seed, 12, 8, "unstructured")
    start = random_feasible(problem, seed)
    last = problem.objective(start)
    whole = solve(problem, RefittedSwaps(), start=start)
    assert whole.steps > 20
    for steps in range(whole.steps):
        found = solve(problem, RefittedSwaps(), start=start, max_steps=steps)
        assert found.violation == 0
        assert found.objective <= last + rounding(problem.loss, found.value)
        last = found.objective
    assert whole.objective <= last + rounding(problem.loss, whole.value)


@by_pattern
def test_how_many_rows_are_searched_together_changes_nothing(pattern, monkeypatch):
    problem = correlated(0, 9, 16, pattern)
    together = solve(problem, RefittedSwaps())
    monkeypatch.setattr(refitted_swaps, "BATCH_BYTES", 8 * 18**2 * 2)
    monkeypatch.setattr(refitted_swaps, "REFRESH", 2)
    apart = solve(problem, RefittedSwaps())
    assert apart.steps > together.steps
    assert torch.equal(problem.support(apart.value), problem.support(together.value))
    assert torch.allclose(apart.value, together.value, rtol=0, atol=1e-9)


def test_rows_that_keep_all_or_nothing_have_no_exchange():
    problem = correlated(0, 3, 8, "unstructured")
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0], mask[1, :4] = True, True
    change, _, _ = batch_of(problem, mask).best(Search(32))
    assert change[[0, 2]].tolist() == [torch.inf, torch.inf] and float(change[1]) < torch.inf


def test_where_the_gram_matrix_is_singular_a_note_says_so_and_nothing_gets_worse():
    torch.manual_seed(0)
    inputs = torch.randn(5, 12, dtype=torch.float64)
    loss = LayerLoss.of(torch.randn(4, 12, dtype=torch.float64), InputMoments.from_samples(inputs))
    problem = SparseLeastSquares(loss, Unstructured(24))
    found = solve(problem, RefittedSwaps())
    assert "singular Gram matrix" in found.notes[0]
    assert found.objective <= problem.objective(problem.start()) and found.violation == 0


@pytest.mark.parametrize("difference", [1e-5, 1e-6])
@pytest.mark.parametrize("pattern", [RowWise(4), NM(1, 4)], ids=repr)
def test_inputs_that_nearly_repeat_each_other_are_noted_and_nothing_gets_worse(pattern, difference):
    """The inverse of A is accurate, and that of a block of it is not."""
    for seed in range(3):
        problem = SparseLeastSquares(nearly_repeated(difference, seed), pattern)
        start = solve(problem, Restore())
        found = solve(problem, RefittedSwaps(), start=start.value)
        assert found.notes == (INACCURATE,)
        assert found.objective <= start.objective


@by_pattern
def test_it_goes_on_from_where_exchanges_without_a_refit_stop(pattern):
    """On correlated inputs single exchanges with all others fixed stop early."""
    ours = before = 0.0
    for seed in range(6):
        problem = correlated(seed, 8, 16, pattern)
        start = solve(problem, Admm()).value
        before += solve(problem, Chain((ConjugateGradients(), Swaps(), ConjugateGradients())), start=start).objective
        ours += solve(problem, RefittedSwaps(), start=start).objective
    assert ours < 0.99 * before


# -- faults planted

best, pivot = Batch.best, Batch._pivot


def without_a_refit(self, search):
    """The other weights of a row stay as they are: the change of an exchange without the crossing."""
    crossing = torch.where(torch.eye(self.tableau.shape[1], dtype=torch.bool), self.tableau, 0.0)
    crossing[:, -2] = self.tableau[:, -2]
    return best(replace(self, tableau=crossing), search)


def only_leaves(self, leaving, entering):
    pivot(self, leaving, entering)
    self.tableau[torch.arange(len(leaving)), entering, entering] *= -1


FAULTS = {
    "the crossing of the two weights is left out": (
        *(Batch, "best", without_a_refit),
        lambda: test_the_best_exchange_of_every_row_is_found_and_its_change_is_exact("rows", 0),
    ),
    "a pivot has the wrong sign": (
        *(Batch, "_pivot", only_leaves),
        lambda: test_a_tableau_after_exchanges_is_the_one_from_scratch("rows"),
    ),
    "no weight moves between rows": (
        *(refitted_swaps, "_between_rows", lambda state, exchanges, threshold: state.pending[:0]),
        lambda: [test_no_move_between_two_rows_is_left_that_gains(seed) for seed in range(2)],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
