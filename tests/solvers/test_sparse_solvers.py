"""Solvers of sparse problems against literal implementations, exhaustion and their own promises at every step."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.patterns import NM
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    FistaPath,
    FistaPruner,
    GreedyObs,
    HardThreshold,
    Magnitude,
    RefittedSwaps,
    Restore,
    SparseGpt,
    Swaps,
    Wanda,
    solve,
)
from optprune.testing import reference, reference_optimum
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import sparse
from optprune.testing.transformations import random_feasible
from tests.helpers.faults import noticed
from tests.helpers.literal_choice import literal_choice
from tests.helpers.sparse_cases import PATTERN_NAMES, by_pattern, correlated

FEWER = settings(max_examples=max(settings().max_examples // 2, 1))
SEEDS = range(30)


# -- magnitude and Wanda


@given(sparse())
def test_magnitude_and_wanda_are_the_literal_loops(problem):
    weight, gram = problem.loss.weight, problem.loss.moments.gram
    literal = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            literal[i, j] = abs(weight[i, j]) * gram[j, j] ** 0.5
    for solver, scores in ((Magnitude(), weight.abs()), (Wanda(), literal)):
        # Ties go to the lower index on both sides: sorted is stable.
        expected = torch.where(literal_choice(scores, problem.pattern), weight, 0.0)
        assert torch.equal(solve(problem, solver).value, expected), solver.label


# -- promises at every step


def objectives(problem, solver, start):
    found = [problem.objective(start)]
    solve(problem, solver, start=start, callback=lambda _, weight: found.append(problem.objective(weight())))
    return found


@pytest.mark.parametrize("solver", [HardThreshold(), FistaPruner(), Swaps(), ConjugateGradients()], ids=str)
@FEWER
@given(problem=sparse(), seed=st.integers(0, 100))
def test_the_objective_never_rises_from_one_step_to_the_next(solver, problem, seed):
    start = random_feasible(problem, seed)
    found = objectives(problem, solver, start)
    # Of the largest weights on the way, which are the start's or the original's.
    slack = rounding(problem.loss, start) + rounding(problem.loss, problem.loss.weight)
    for before, after in pairwise(found):
        assert after <= before + slack


@pytest.mark.parametrize("solver", [FistaPath(), Admm(), SparseGpt(), Wanda()], ids=lambda solver: solver.label)
@by_pattern
def test_the_start_is_ignored_where_that_is_promised(solver, pattern):
    problem = correlated(1, 6, 16, pattern)
    answers = [solve(problem, solver, start=random_feasible(problem, seed)).value for seed in range(3)]
    answers.append(solve(problem, solver).value)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("solver", [Swaps(), ConjugateGradients()], ids=lambda solver: solver.label)
@by_pattern
def test_swaps_and_conjugate_gradients_begin_at_the_support_of_an_infeasible_start(solver, pattern):
    problem = correlated(1, 6, 16, pattern)
    first = torch.where(problem.support(problem.loss.weight), problem.loss.weight, 0.0)
    found, expected = (solve(problem, solver, start=start).value for start in (problem.loss.weight, first))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("option", ["batch", "every", "most", "rho", "tolerance", "ratio", "inner_steps", "candidates"])
def test_options_without_sense_are_refused(option):
    owner = next(
        cls for cls in (GreedyObs, Admm, FistaPath, ConjugateGradients, Swaps) if option in cls.__dataclass_fields__
    )
    kind = type(owner.__dataclass_fields__[option].default)
    for value in (0, -1, *((math.nan, math.inf) if kind is float else ())):
        with pytest.raises(ValueError, match=f"{option} of {owner.__name__} must be"):
            owner(**{option: kind(value)})


# -- how good


@pytest.mark.e2e
@by_pattern
def test_admm_is_feasible_and_with_a_refit_better_than_wanda_with_a_refit(pattern):
    """On the mean of 30 fixed instances [16, 32]; measured 0.45, 0.48 and 0.53 of it. Stated: 0.6."""
    ours, theirs = [], []
    for seed in SEEDS:
        problem = correlated(seed, 16, 32, pattern)
        admm = solve(problem, Admm())
        assert admm.violation == 0
        ours.append(solve(problem, ConjugateGradients(), start=admm.value).objective)
        theirs.append(solve(problem, Chain((Wanda(), ConjugateGradients()))).objective)
    assert fmean(ours) < 0.6 * fmean(theirs)


# Shares of 180 fixed tiny instances ([1, 8] and [3, 4], three patterns) whose exhaustive optimum is met. Measured:
# 117 of 180 (65 percent) with ADMM in front, 105 (58 percent) with swaps from the plain magnitude start, and 173 (96
# percent) by exchanges with a refit.
STATED_SHARES = {
    Chain((Admm(), ConjugateGradients(), Swaps(), Restore())): 0.60,
    Chain((Swaps(), Restore())): 0.53,
    Chain((Admm(), ConjugateGradients(), RefittedSwaps())): 0.93,
}
SLOW, *OTHERS = STATED_SHARES


@cache
def tiny():
    """The 180 instances with their optima."""
    shapes = [(seed, *shape) for seed in SEEDS for shape in ((1, 8), (3, 4))]
    problems = [correlated(*shape, pattern, tokens=40) for shape in shapes for pattern in PATTERN_NAMES]
    return [(problem, reference(problem).optimum) for problem in problems]


@pytest.mark.e2e
@pytest.mark.parametrize("solver", [pytest.param(SLOW, marks=pytest.mark.slow), *OTHERS], ids=lambda one: one.label)
def test_the_exhaustive_optimum_is_met_on_the_stated_share(solver):
    met = 0
    for problem, best in tiny():
        objective = solve(problem, solver).objective
        assert objective >= best * (1 - 1e-9)
        # Exactly, up to the promise about restored answers.
        met += objective <= best * (1 + 1e-8)
    assert len(tiny()) == 180
    assert met >= STATED_SHARES[solver] * len(tiny()), f"only {met}"


# -- faults planted: heuristics promise little to the laws, so these tests must notice

admm_step = Admm.step


def dual_dropped(self, problem, state):
    after = admm_step(self, problem, state)
    return replace(after, dual=torch.zeros_like(after.dual))


def dual_reversed(self, problem, state):
    after = admm_step(self, problem, state)
    return replace(after, dual=2 * state.dual - after.dual)


def admm_with_every_pattern():
    for pattern in PATTERN_NAMES:
        test_admm_is_feasible_and_with_a_refit_better_than_wanda_with_a_refit(pattern)


FAULTS = {
    "ADMM without its dual": (Admm, "step", dual_dropped, admm_with_every_pattern),
    "ADMM with the dual reversed": (Admm, "step", dual_reversed, admm_with_every_pattern),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])


@pytest.mark.parametrize("seed", range(3))
def test_four_in_eight_never_costs_more_than_two_in_four(seed: int) -> None:
    narrow = correlated(seed, 1, 8, "2:4")
    wide = replace(narrow, pattern=NM(4, 8))
    assert reference_optimum(wide) <= reference_optimum(narrow)
    # Started at the answer for 2:4, which 4:8 admits, exchanges and a refit lose nothing.
    answer = solve(narrow)
    better = solve(wide, Chain((Swaps(), Restore())), start=answer.value)
    assert wide.violation(answer.value) == 0
    assert better.violation == 0
    assert better.objective <= answer.objective + narrow.measuring_error(answer.value)
