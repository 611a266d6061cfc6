"""Every concrete kind of problem with every concrete solver: accepted pairs keep the laws, refused ones say why."""

from dataclasses import replace
from typing import TypeVar, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optprune.problems
import optprune.solvers
from optprune.patterns import Pattern
from optprune.penalties import Penalty
from optprune.problems import PenalisedLeastSquares
from optprune.solvers import (
    Chain,
    FaspMetric,
    Fista,
    ProximalAdmm,
    Restore,
    Solver,
    solve,
)
from optprune.testing import REFERENCES, STRATEGIES, laws
from optprune.testing.strategies import METRIC_KINDS, PATTERNS, PENALTIES, concrete, weighted
from optprune.testing.transformations import permuted, random_feasible, scaled
from tests.helpers.solver_table import (
    ACCEPTED,
    AT_RANDOM,
    DTYPES,
    KINDS,
    MADE_BY_HAND,
    SOLVERS,
    by_dtype,
    by_kind,
    by_pair,
    by_solver,
    in_order,
)

# Where the laws themselves are not at stake, and where nothing is degenerate, fewer examples show as much.
FEWER = settings(max_examples=max(settings().max_examples // 4, 1))
EXAMPLES = settings().max_examples
# `make test` draws a third of the examples, `make test-all` all of them.
by_examples = pytest.mark.parametrize("examples", [EXAMPLES // 3, pytest.param(EXAMPLES, marks=pytest.mark.slow)])


def up_to(examples):
    return settings(max_examples=max(examples, 1))


def of_any_dtype(kind):
    return st.sampled_from(DTYPES).flatmap(lambda dtype: STRATEGIES[kind](dtype=dtype))


@by_examples
@by_dtype
@by_pair
def test_accepted_problems_keep_the_laws(kind, solver, dtype, examples):
    @up_to(examples if dtype == torch.float64 else examples // 4)
    @given(STRATEGIES[kind](dtype=dtype))
    def check(problem):
        laws.keep_laws(problem, solver)

    check()


@by_solver
def test_a_kind_is_accepted_for_every_problem_or_refused_for_every_one_with_the_reason(solver):
    for kind in KINDS:

        @FEWER
        @given(of_any_dtype(kind))
        def check(problem):
            accepted = solver.refusal(problem) is None
            assert accepted == ((type(problem).__name__, solver.label) in ACCEPTED)
            if not accepted:
                laws.refuse(problem, solver)

        check()


@by_examples
@by_pair
def test_an_infeasible_start_never_comes_back_as_an_answer(kind, solver, examples):
    @up_to(examples // 4)
    @given(of_any_dtype(kind))
    def check(problem):
        if not laws.refused_as_singular(problem, solver):
            for start in (problem.loss.weight, torch.ones_like(problem.loss.weight)):
                assert solve(problem, solver, start=start).violation == 0
                assert solve(problem, solver, start=start, max_steps=0).violation == 0

    check()


@by_examples
@by_pair
def test_the_default_device_is_not_used(kind, solver, examples):
    """Under a default device that holds no numbers the answer is the same: everything made is where the problem is."""

    @up_to(examples // 10)
    @given(st.sampled_from(METRIC_KINDS).flatmap(lambda metric: weighted(kind, metric)))
    def check(problem):
        if solver.refusal(problem.in_output_basis()[0]) is not None or laws.refused_as_singular(problem, solver):
            return
        expected = solve(problem, solver)
        # A new loss, which has not yet remembered anything.
        anew = replace(problem, loss=replace(problem.loss))
        with torch.device("meta"):
            found = solve(anew, solver)
        assert found.value.device == expected.value.device
        assert torch.equal(found.value, expected.value)
        assert found.objective == expected.objective

    check()


@by_examples
@by_pair
def test_answers_follow_names_and_units_where_nothing_ties(kind, solver, examples):
    @up_to(examples // 4)
    @given(STRATEGIES[kind](generic=True))
    def check(problem):
        if in_order(solver):
            laws.scaling_scales_the_answer(problem, solver)
        elif not isinstance(solver, AT_RANDOM):
            for law in laws.GENERIC_LAWS:
                law(problem, solver)

    check()


@by_solver
def test_what_a_solver_accepts_is_what_its_methods_are_written_for(solver):
    arguments = (get_args(base) for cls in type(solver).__mro__ for base in getattr(cls, "__orig_bases__", ()))
    problem = next(kinds[0] for kinds in arguments if kinds and not isinstance(kinds[0], TypeVar))
    assert solver.accepts == (get_args(problem) or (problem,))


# Which promises are made, in full: the laws hold a solver to its promises, so a withdrawn one must be seen.
@by_kind
def test_promises(kind):
    @FEWER
    @given(STRATEGIES[kind]())
    def check(problem):
        masked = kind.__name__ == "MaskedLeastSquares"
        if Restore().refusal(problem) is None:
            assert Restore().exact(problem) == masked
            assert Restore().monotone(problem)
            assert Chain((FaspMetric(), Restore())).exact(problem) == masked
        if FaspMetric().refusal(problem) is None:
            assert not Chain((Restore(), FaspMetric())).exact(problem)
            assert not Chain((Restore(), FaspMetric())).monotone(problem)
            assert not FaspMetric().monotone(problem)
        for solver in SOLVERS:
            if solver.refusal(problem) is None:
                assert solver.exact(problem) == (solver.label == "Restore" and masked), solver.label
                assert solver.monotone(problem) == (solver.label in MONOTONE), solver.label
                assert solver.promised_gap(problem) is None or solver.label in CERTIFYING, solver.label

    check()


MONOTONE = {
    "ChannelSwaps",
    "ConjugateGradients",
    "Fista",
    "FistaPruner",
    "GridDescent",
    "HardThreshold",
    "PerspectiveBound",
    "ProximalAdmm",
    "RefittedSwaps",
    "RemovalBound",
    "Restore",
    "Swaps",
}


CERTIFYING = {"Fista", "ProximalAdmm"}


@pytest.mark.parametrize("solver", [Fista(1e-3), ProximalAdmm(1e-3)], ids=lambda solver: solver.label)
@given(problem=STRATEGIES[PenalisedLeastSquares]())
def test_convex_solvers_promise_their_tolerance(solver, problem):
    damped = bool((problem.loss.damping > 0).all())
    assert solver.promised_gap(problem) == (1e-3 if damped else None)


def test_every_kind_of_problem_has_a_strategy_a_reference_and_its_transformations():
    assert KINDS, "no concrete problem found: the inspection is broken"
    for kind in KINDS:
        assert kind in STRATEGIES, f"{kind.__name__} has no strategy: add one to optprune/testing/strategies.py"
        assert kind in REFERENCES, f"{kind.__name__} has no reference: add one to optprune/testing/references.py"
        for function in (permuted, scaled, random_feasible):
            assert kind in function.registry, f"{function.__name__} in transformations.py lacks {kind.__name__}"


def test_strategies_draw_the_kind_they_are_listed_under():
    for kind, strategy in STRATEGIES.items():

        @FEWER
        @given(strategy())
        def check(problem):
            assert type(problem) is kind  # noqa: B023 - called within this turn of the loop

        check()


def test_every_solver_can_be_made_by_its_defaults_or_is_listed():
    assert SOLVERS, "no concrete solver found: the inspection is broken"
    for cls in concrete(Solver):
        if cls in MADE_BY_HAND:
            assert all(type(solver) is cls for solver in MADE_BY_HAND[cls])
        else:
            assert type(cls()) is cls, f"give {cls.__name__} defaults, or list it in MADE_BY_HAND"


def test_every_penalty_has_a_strategy():
    for penalty in concrete(Penalty):
        assert penalty in PENALTIES, f"{penalty.__name__} has no strategy: add one to optprune/testing/strategies.py"


def test_every_pattern_has_a_strategy():
    for pattern in concrete(Pattern):
        assert pattern in PATTERNS, f"{pattern.__name__} has no strategy: add one to optprune/testing/strategies.py"


@pytest.mark.parametrize("package", [optprune.problems, optprune.solvers])
def test_exported_names_exist_and_concrete_classes_are_exported(package):
    assert all(hasattr(package, name) for name in package.__all__)
    for cls in KINDS + concrete(Solver):
        if cls.__module__.startswith(package.__name__):
            assert cls.__name__ in package.__all__, f"{cls.__name__} is not exported"
