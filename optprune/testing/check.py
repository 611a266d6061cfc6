"""Checks of a solver and of a penalty by all laws, for classes that are defined outside optprune too."""

import torch
from hypothesis import given
from torch import Tensor

from optprune.penalties import Penalty
from optprune.problems import Problem
from optprune.solvers import AnySolver
from optprune.testing import laws
from optprune.testing.strategies import (
    METRIC_KINDS,
    SLOW_OR_NESTED,
    STRATEGIES,
    MetricKind,
    law_settings,
    weighted,
    weights,
)


def check_solver(solver: AnySolver, *, examples: int = 20, shrink: bool = True) -> None:
    """Raise AssertionError unless the solver keeps every law on what it accepts and refuses the rest with a reason.

    Draws `examples` problems of every known kind in float64, the same ones every time, and a quarter as many of them in
    float32, with a diagonal and with a full output metric. `shrink` looks for the smallest problem that breaks the law
    before reporting it, which takes a while; without it the first one found is reported.
    """
    fewer = max(examples // 4, 1)
    draws: list[tuple[MetricKind, torch.dtype, int]] = [
        ("none", torch.float64, examples),
        ("none", torch.float32, fewer),
        *((metric, torch.float64, fewer) for metric in METRIC_KINDS if metric != "none"),
    ]
    accepted = [
        kind.kind
        for metric, dtype, count in draws
        for kind in STRATEGIES
        if _check_kind(solver, kind, metric, dtype, count, shrink)
    ]
    assert accepted, f"{solver.label} accepted no problem of any kind: {', '.join(kind.kind for kind in STRATEGIES)}"


def _check_kind(
    solver: AnySolver, kind: type[Problem], metric: MetricKind, dtype: torch.dtype, examples: int, shrink: bool
) -> int:
    """Check a solver on one kind of problem, and return the number of accepted problems."""
    accepted = 0
    problems = STRATEGIES[kind](dtype=dtype) if metric == "none" else weighted(kind, metric, dtype=dtype)

    # One broken law is an AssertionError; several would be an exception group.
    @law_settings(examples, suppressed=SLOW_OR_NESTED, shrink=shrink)
    @given(problems)
    def check(problem: Problem) -> None:
        nonlocal accepted
        if solver.refusal(problem) is None:
            accepted += 1
            laws.keep_laws(problem, solver)
        else:
            laws.refuse(problem, solver)

    check()
    return accepted


def check_penalty(penalty: Penalty, *, shape: tuple[int, int] = (3, 4), examples: int = 50) -> None:
    """Raise AssertionError unless a penalty keeps every law, on weights [out, in] of the given shape.

    Draws `examples` weights in float64, with ties, zeros and rows of zeros, the same ones every time.
    """
    rows, width = shape

    @law_settings(examples)
    @given(weights(width, rows=rows))
    def check(weight: Tensor) -> None:
        for law in laws.PENALTY_LAWS:
            law(penalty, weight)

    check()
