"""Swaps: every exchange and its change, measured; and what is left when they stop."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from optprune.patterns import NM, Unstructured
from optprune.solvers import (
    Status,
    Swaps,
    solve,
)
from optprune.solvers.swaps import _best_in_groups, _best_in_rows, _between_rows, _removal_cost
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import sparse
from optprune.testing.transformations import random_feasible
from tests.helpers.faults import noticed
from tests.helpers.sparse_cases import by_pattern, correlated


def best_entry(problem, weight, i, q):
    """The best value of one entry with all others fixed, from three measurements of the objective."""
    values = []
    for trial in (-1.0, 0.0, 1.0):
        other = weight.clone()
        other[i, q] = trial
        values.append(problem.objective(other))
    curve = values[0] - 2 * values[1] + values[2]
    other = weight.clone()
    other[i, q] = (values[0] - values[2]) / (2 * curve) if curve > 0 else 0.0
    return other


def literal_exchanges(problem, weight, mask, i):
    """(change, p, q) of every exchange that the pattern allows within row i, measured."""
    before, width = problem.objective(weight), weight.shape[1]
    for p in range(width):
        for q in range(width):
            together = not isinstance(problem.pattern, NM) or p // problem.pattern.m == q // problem.pattern.m
            if together and bool(mask[i, p]) and not bool(mask[i, q]):
                without = weight.clone()
                without[i, p] = 0.0
                yield problem.objective(best_entry(problem, without, i, q)) - before, p, q


@by_pattern
@pytest.mark.parametrize("seed", range(4))
def test_the_best_exchange_of_every_row_is_found_and_its_change_is_exact(pattern, seed):
    problem = correlated(seed, 3, 8, pattern)
    start = random_feasible(problem, seed)
    state = Swaps().init(problem, start)
    gram = problem.loss.gram
    removal = _removal_cost(state, gram)
    if isinstance(problem.pattern, NM):
        change, leaving, entering = _best_in_groups(state, gram, removal, problem.pattern.m)
    else:
        change, leaving, entering = _best_in_rows(state, gram, removal, 32)
    for i in range(3):
        literal = min(literal_exchanges(problem, start, state.mask, i))
        # Differences of objectives of about ten, in float64.
        assert float(change[i]) == pytest.approx(literal[0], abs=1e-9)
        assert (int(leaving[i]), int(entering[i])) == literal[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@by_pattern
@pytest.mark.parametrize("seed", range(5))
def test_every_round_of_swaps_lowers_the_objective_by_what_it_predicts(pattern, seed, dtype):
    problem = correlated(seed, 6, 16, pattern, dtype=dtype)
    solver, gram = Swaps(), problem.loss.gram
    state = solver.init(problem, random_feasible(problem, seed))
    rounds = 0
    while solver.done(problem, state) is None:
        before = problem.objective(state.weight)
        removal = _removal_cost(state, gram)
        if isinstance(problem.pattern, NM):
            change, _, _ = _best_in_groups(state, gram, removal, problem.pattern.m)
        else:
            change, _, _ = _best_in_rows(state, gram, removal, solver.candidates)
        predicted = float(change[change < -state.threshold].sum())
        slack = rounding(problem.loss, state.weight)
        following = solver.step(problem, state)
        measured = problem.objective(following.weight) - before
        slack += rounding(problem.loss, following.weight)
        if isinstance(problem.pattern, Unstructured):
            # The exchange between rows comes on top, and only ever lowers the objective further.
            assert measured <= predicted + slack
        else:
            assert abs(measured - predicted) <= slack
        assert problem.violation(following.weight) == 0
        state, rounds = following, rounds + 1
    assert rounds > 1
    assert rounds <= 500


@pytest.mark.parametrize("seed", range(8))
def test_an_exchange_between_rows_is_the_cheapest_removal_and_the_most_gainful_entry(seed):
    problem = correlated(seed, 5, 8, "unstructured")
    start = random_feasible(problem, seed)
    state, after = Swaps().init(problem, start), Swaps().init(problem, start)
    moved = _between_rows(after, problem.loss.gram, problem.pattern.exchanges())
    left, entered = state.mask & ~after.mask, after.mask & ~state.mask
    assert int(left.sum()) == int(entered.sum())
    assert sorted(moved.tolist()) == (left | entered).any(1).nonzero()[:, 0].tolist()
    before, predicted = problem.objective(start), 0.0
    for i in range(5):
        removals, entries = [], []
        for j in range(8):
            without = start.clone()
            without[i, j] = 0.0
            if bool(state.mask[i, j]):
                removals.append((problem.objective(without) - before, j))
            else:
                entries.append((problem.objective(best_entry(problem, start, i, j)) - before, j))
        if bool(left[i].any()):
            assert left[i].nonzero()[:, 0].tolist() == [min(removals)[1]]
            predicted += min(removals)[0]
        if bool(entered[i].any()):
            assert entered[i].nonzero()[:, 0].tolist() == [min(entries)[1]]
            predicted += min(entries)[0]
    assert problem.objective(after.weight) - before == pytest.approx(predicted, abs=1e-9)
    assert predicted <= 0


@by_pattern
def test_a_round_of_swaps_writes_in_place_into_what_is_its_own(pattern):
    """A round copies no row that stays as it is; neither the start nor a value that was read changes."""
    problem, solver = correlated(0, 8, 16, pattern), Swaps()
    start = problem.start()
    state, copy = solver.init(problem, start), start.clone()
    first, before = (
        solver.value(problem, state),
        [part.data_ptr() for part in (state.weight, state.gradient, state.mask)],
    )
    assert not {start.data_ptr(), first.data_ptr()} & set(before)
    state = solver.step(problem, state)
    assert [part.data_ptr() for part in (state.weight, state.gradient, state.mask)] == before
    assert torch.equal(start, copy) and torch.equal(first, copy)
    assert not torch.equal(solver.value(problem, state), copy)
    assert torch.allclose(state.gradient, problem.loss.gradient(state.weight), rtol=0, atol=1e-12)


@given(sparse())
def test_no_exchange_is_left_that_gains_when_swaps_stop(problem):
    solution = solve(problem, Swaps())
    assert solution.status is Status.CONVERGED
    mask = problem.support(solution.value)
    slack = 4 * rounding(problem.loss, solution.value) + problem.loss.constant * 1e-12
    for i in range(mask.shape[0]):
        for change, p, q in literal_exchanges(problem, solution.value, mask, i):
            assert change >= -slack, f"row {i}: {p} for {q} gains {-change}"


# -- faults planted: heuristics promise little to the laws, so these tests must notice

swaps = importlib.import_module("optprune.solvers.swaps")
best_in_rows, best_in_groups = swaps._best_in_rows, swaps._best_in_groups


def wrong_gain_in_rows(state, *arguments):
    return best_in_rows(replace(state, gradient=-state.gradient), *arguments)


def wrong_gain_in_groups(state, *arguments):
    return best_in_groups(replace(state, gradient=-state.gradient), *arguments)


def a_round(pattern):
    test_every_round_of_swaps_lowers_the_objective_by_what_it_predicts(pattern, 0, torch.float64)


FAULTS = {
    # An entering weight gets its best value whichever it is, so from a bad start even wrong exchanges gain: the law
    # about starts does not see this one.
    "gain of an exchange in a row": (swaps, "_best_in_rows", wrong_gain_in_rows, lambda: a_round("rows")),
    "gain of an exchange in a group": (swaps, "_best_in_groups", wrong_gain_in_groups, lambda: a_round("2:4")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
