"""The one driver: runs any solver on any problem it accepts, and lets the problem measure the answer."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError, NoSolver
from optprune.metric import RowUnits
from optprune.problems import Problem
from optprune.solvers.auto import choose
from optprune.solvers.base import Solver
from optprune.solvers.solution import Solution, Status

Callback = Callable[[int, Callable[[], Tensor]], None]
"""called after every step with the number of steps and a function that gives the current weight"""


def solve(
    problem: Problem,
    solver: Solver | None = None,
    *,
    start: Tensor | None = None,
    max_steps: int = 10_000,
    max_seconds: float = math.inf,
    callback: Callback | None = None,
) -> Solution:
    """Solve a problem, by the given solver or by the one that `choose` picks.

    `start` [out, in] is a warm start; without it the problem's own start is used. The objective and the violation
    of the Solution are measured by the problem after the solver has returned. Raises NoSolver when the solver
    refuses the problem. Under an output metric the solver works on other rows (`Problem.even`), where the objective is
    the same number, so certificates need no change.
    """
    solver = choose(problem) if solver is None else solver
    even, units = problem.even()
    reason = solver.why_not(even)
    if reason is not None:
        raise NoSolver(f"{solver.label} does not solve this problem: {reason}")
    if start is None:
        start = problem.start()
    elif start.shape != problem.loss.weight.shape:
        raise InputError(f"the start must be {list(problem.loss.weight.shape)}, not {list(start.shape)}")
    began = time.perf_counter()
    with torch.no_grad():
        state = solver.init(even, start if units is None else units.into(start))
        steps = 0
        while (status := solver.done(even, state)) is None:
            if steps >= max_steps:
                status = Status.STEP_LIMIT
                break
            if time.perf_counter() - began >= max_seconds:
                status = Status.TIME_LIMIT
                break
            state = solver.step(even, state)
            steps += 1
            if callback is not None:
                callback(steps, partial(_value, solver, even, state, units))
        value = _value(solver, even, state, units)
        certificate = solver.certify(even, state)
        seconds = time.perf_counter() - began
        objective = problem.objective(value)
        if not math.isfinite(objective):
            status = Status.NONFINITE
        violation = problem.violation(value)
    return Solution(
        value, objective, violation, status, steps, seconds, certificate, solver.history(state), solver.notes(state)
    )


def _value(solver: Solver, problem: Problem, state: Any, units: RowUnits | None) -> Tensor:
    """The weight that a state stands for, back in its own rows."""
    value = solver.value(problem, state)
    return value if units is None else units.back(value)
