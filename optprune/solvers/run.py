"""The one driver: runs any solver on any problem it accepts, and lets the problem measure the answer."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError, NoSolver
from optprune.metric import RowUnits
from optprune.precision import full_precision
from optprune.problems import Problem
from optprune.solvers.auto import choose
from optprune.solvers.base import Solver
from optprune.solvers.solution import Certificate, Solution, Status

MOST_STEPS = 10_000
CONTRADICTED = "the certificate was dropped"
"""how the note begins where a lower bound cannot be one"""
Callback = Callable[[int, Callable[[], Tensor]], None]
"""called after every step with the number of steps and a function that gives the current weight"""


@full_precision()
def solve(
    problem: Problem,
    solver: Solver | None = None,
    *,
    start: Tensor | None = None,
    max_steps: int = MOST_STEPS,
    max_seconds: float = math.inf,
    callback: Callback | None = None,
) -> Solution:
    """Solve a problem, by the given solver or by the one that `choose` picks.

    `start` [out, in] is a warm start; without it the problem's own start is used. The objective and the violation
    of the Solution are measured by the problem after the solver has returned. A certificate that the answer
    contradicts, its bound above the objective by more than rounding, is dropped with a note. Raises NoSolver when the
    solver refuses the problem. Under an output metric the solver works on other rows (`Problem.even`), where the
    objective is the same number, or larger by what outputs that cost nothing are made to cost, which certificates do
    not claim.
    """
    solver = choose(problem) if solver is None else solver
    even, units = problem.even()
    check_accepted(even, solver)
    if start is None:
        start = problem.start()
    elif start.shape != problem.loss.weight.shape:
        raise InputError(f"the start must be {list(problem.loss.weight.shape)}, not {list(start.shape)}")
    began = time.perf_counter()
    with torch.no_grad():

        def told(steps: int, state: Any) -> None:
            if callback is not None:
                callback(steps, partial(_value, solver, even, state, units))

        state, status, steps = _iterate(even, solver, _into(start, units), max_steps, began + max_seconds, told)
        value = _value(solver, even, state, units)
        certificate = _without_excess(solver.certify(even, state), problem, units)
        seconds = time.perf_counter() - began
        objective = problem.objective(value)
        if not math.isfinite(objective):
            status = Status.NONFINITE
        violation = problem.violation(value)
        notes = solver.notes(state)
        if certificate is not None and violation == 0:
            bound = certificate.lower_bound
            if bound > objective and bound > objective + problem.loss.rounding(value):
                notes += (f"{CONTRADICTED}: its lower bound {bound:.6g} is above the objective {objective:.6g}",)
                certificate = None
    return Solution(value, objective, violation, status, steps, seconds, certificate, solver.history(state), notes)


def check_accepted(even: Problem, solver: Solver) -> None:
    """Raise NoSolver when a solver refuses a problem, which is evened as `solve` does it."""
    reason = solver.why_not(even)
    if reason is not None:
        raise NoSolver(f"{solver.label} does not solve this problem: {reason}")


@full_precision()
def answer(problem: Problem, solver: Solver, start: Tensor) -> Tensor:
    """What `solve` would return as the value, neither measured nor certified: for the inner steps of something else."""
    even, units = problem.even()
    with torch.no_grad():
        state, _, _ = _iterate(even, solver, _into(start, units), MOST_STEPS, math.inf, lambda steps, state: None)
        return _value(solver, even, state, units)


def _iterate(
    problem: Problem, solver: Solver, start: Tensor, most: int, until: float, told: Callable[[int, Any], None]
) -> tuple[Any, Status, int]:
    """The solver's last state, why it stopped, and after how many steps."""
    state, steps = solver.init(problem, start), 0
    while (status := solver.done(problem, state)) is None:
        if steps >= most:
            return state, Status.STEP_LIMIT, steps
        if time.perf_counter() >= until:
            return state, Status.TIME_LIMIT, steps
        state = solver.step(problem, state)
        steps += 1
        told(steps, state)
    return state, status, steps


def _without_excess(certificate: Certificate | None, problem: Problem, units: RowUnits | None) -> Certificate | None:
    """What a bound on the evened problem proves of the problem itself.

    A row of an optimum may be taken to cost no more, metric aside, than a row of zeros; so with all rows it costs no
    more than c/2, and evening the problem adds at most the excess times that.
    """
    if certificate is None or units is None or not units.excess:
        return certificate
    bound = certificate.lower_bound - units.excess * problem.loss.plain.constant / 2
    # No loss is negative, so neither is what is left of a bound that was not.
    return replace(certificate, lower_bound=max(bound, min(certificate.lower_bound, 0.0)))


def _into(weight: Tensor, units: RowUnits | None) -> Tensor:
    return weight if units is None else units.into(weight)


def _value(solver: Solver, problem: Problem, state: Any, units: RowUnits | None) -> Tensor:
    """The weight that a state stands for, back in its own rows."""
    value = solver.value(problem, state)
    return value if units is None else units.back(value)
