"""The one driver: runs any solver on any problem it accepts, and lets the problem measure the answer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError, NoSolver
from optprune.metric import OutputBasis
from optprune.numerics.precision import full_precision
from optprune.problems import MaskedLeastSquares, Problem
from optprune.solvers.admm import Admm
from optprune.solvers.base import AnySolver, Certificate, Solution, Status
from optprune.solvers.chain import Chain
from optprune.solvers.channel_swaps import ChannelSwaps
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.greedy_obs import GreedyObs
from optprune.solvers.proximal_admm import ProximalAdmm
from optprune.solvers.restore import Restore
from optprune.solvers.swaps import Swaps

CANDIDATES: tuple[AnySolver, ...] = (
    Chain((GreedyObs(), ChannelSwaps(), Restore())),
    ProximalAdmm(),
    Chain((Admm(haste=0.3), ConjugateGradients(), Swaps(), ConjugateGradients())),
    Chain((Admm(haste=0.3), ConjugateGradients())),
    Restore(),
    ConjugateGradients(),
)

ROW_FACTORS = 1e8
"""multiplications, about a tenth of a second, above which a Cholesky factor for every row is no longer worth it"""
GRADIENTS = ConjugateGradients(1e-5)
"""the solver that, on layers of a real model, proves a gap of 1e-6 or less, in a tenth of the time of restoration"""


def choose(problem: Problem) -> AnySolver:
    """The solver optprune recommends for a problem; NoSolver lists every candidate's reason for refusing."""
    if isinstance(problem, MaskedLeastSquares) and _costly_to_factorise(problem):
        return GRADIENTS
    reasons: list[str] = []
    for solver in CANDIDATES:
        reason = solver.refusal(problem)
        if reason is None:
            return solver
        reasons.append(f"{solver.label}: {reason}")
    raise NoSolver(f"no solver accepts a {type(problem).__name__}; " + "; ".join(reasons))


def _costly_to_factorise(problem: MaskedLeastSquares) -> bool:
    """Whether masks that differ from row to row ask for too many factors, and damping lets gradients certify."""
    rows, most = problem.mask.shape[0], int(problem.mask.sum(1).max())
    damped = bool((problem.loss.damping > 0).all())
    return rows > 1 and damped and rows * most**3 > ROW_FACTORS


MOST_STEPS = 10_000
DEAD = "every input was zero, or constant beside a bias, on all tokens: any choice is as good, and nothing is restored"
"""what is noted, and proves that the answer is optimal"""
CONTRADICTED = "the certificate was dropped"
"""how the note begins where a lower bound cannot be one"""
Callback = Callable[[int, Callable[[], Tensor]], None]
"""called after every step with the number of steps and a function that gives the current weight"""


@full_precision()
def solve(
    problem: Problem,
    solver: AnySolver | None = None,
    *,
    start: Tensor | None = None,
    max_steps: int = MOST_STEPS,
    max_seconds: float = math.inf,
    callback: Callback | None = None,
) -> Solution:
    """Solve a problem, by the given solver or by the one that `choose` picks.

    `start` [out, in] is a warm start; without it the problem's own start is used. The objective and the violation
    of the Solution are measured by the problem after the solver has returned, and what float64 may have rounded there
    (`Problem.measuring_error`) is taken off a lower bound. One that is still above the objective cannot be one: it is
    dropped with a note. Raises NoSolver when the solver refuses the problem. Under an output metric the solver works in
    another basis of the outputs (`Problem.in_output_basis`), and where weights or inputs are very large or small in
    other units of them (`Problem.in_moderate_units`); what is proved is proved of the problem as it came. Where all
    feasible weights cost the same, as those of inputs that are all zero, one by the start is the answer.
    """
    solver = choose(problem) if solver is None else solver
    posed = _Posed.of(problem)
    check_accepted(posed.problem, solver)
    if start is None:
        start = problem.start()
    elif start.shape != problem.loss.weight.shape:
        raise InputError(f"the start must be {list(problem.loss.weight.shape)}, not {list(start.shape)}")
    began = time.perf_counter()
    with torch.no_grad():
        any_value = problem.indifferent(start)
        if any_value is not None:
            objective, violation = problem.objective(any_value), problem.violation(any_value)
            proof = Certificate(_below(objective, objective, problem, any_value), DEAD)
            seconds = time.perf_counter() - began
            return Solution(any_value, objective, violation, Status.CONVERGED, 0, seconds, proof, notes=(DEAD,))

        def after_step(steps: int, state: Any) -> None:
            if callback is not None:
                callback(steps, partial(_value, solver, posed, state))

        state, status, steps = _iterate(
            posed.problem, solver, posed.into(start), max_steps, began + max_seconds, after_step
        )
        value = _value(solver, posed, state)
        certificate = _best(posed.certificate(solver.certify(posed.problem, state)), solver.prove(problem, value))
        seconds = time.perf_counter() - began
        objective = problem.objective(value)
        if not math.isfinite(objective):
            status = Status.NONFINITE
        violation = problem.violation(value)
        notes = solver.notes(state)
        if certificate is not None and violation == 0:
            bound = _below(certificate.lower_bound, objective, problem, value)
            # Written so that NaN is none.
            if bound <= objective:
                certificate = replace(certificate, lower_bound=bound)
            else:
                bound = certificate.lower_bound
                notes += (f"{CONTRADICTED}: its lower bound {bound:.6g} is above the objective {objective:.6g}",)
                certificate = None
    history = tuple(replace(one, objective=one.objective * posed.factor) for one in solver.history(state))
    return Solution(value, objective, violation, status, steps, seconds, certificate, history, notes)


def check_accepted(posed: Problem, solver: AnySolver) -> None:
    """Raise NoSolver when a solver refuses a problem, given in the basis of the outputs in which `solve` poses it."""
    reason = solver.refusal(posed)
    if reason is not None:
        raise NoSolver(f"{solver.label} does not solve this problem: {reason}")


@full_precision()
def answer(problem: Problem, solver: AnySolver, start: Tensor) -> Tensor:
    """What `solve` would return as the value, neither measured nor certified: for the inner steps of something else."""
    posed = _Posed.of(problem)
    with torch.no_grad():
        any_value = problem.indifferent(start)
        if any_value is not None:
            return any_value
        state, _, _ = _iterate(
            posed.problem, solver, posed.into(start), MOST_STEPS, math.inf, lambda steps, state: None
        )
        return _value(solver, posed, state)


@dataclass(frozen=True, eq=False)
class _Posed:
    """A problem as its solver meets it: in another basis of the outputs, and weights and inputs of moderate size."""

    problem: Problem
    basis: OutputBasis | None
    size: float
    """the factor of its weights"""
    factor: float
    """what its objective is multiplied by to be that of the problem as it came"""

    @classmethod
    def of(cls, problem: Problem) -> "_Posed":
        rebased, basis = problem.in_output_basis()
        moderate, size, factor = rebased.in_moderate_units()
        return cls(moderate, basis, size, factor)

    def into(self, weight: Tensor) -> Tensor:
        weight = weight if self.basis is None else self.basis.into(weight)
        return weight if self.size == 1 else weight * self.size

    def back(self, weight: Tensor) -> Tensor:
        weight = weight if self.size == 1 else weight / self.size
        return weight if self.basis is None else self.basis.back(weight)

    def certificate(self, found: Certificate | None) -> Certificate | None:
        """What a bound on the problem as posed proves of the problem itself: in another basis nothing, as it rounds."""
        if found is None or self.basis is not None:
            return None
        return replace(found, lower_bound=found.lower_bound * self.factor)


def _best(*found: Certificate | None) -> Certificate | None:
    """The certificate with the highest bound."""
    proved = [one for one in found if one is not None]
    return max(proved, key=lambda one: one.lower_bound, default=None)


def _below(bound: float, objective: float, problem: Problem, value: Tensor) -> float:
    """A bound less what the measured objective of the answer may be off by, or that share of it for a lower bound.

    Then it is no higher than what is measured. Nothing is measured below zero.
    """
    if bound <= 0:
        return bound
    share = min(bound / objective, 1.0) if objective > 0 else 1.0
    return max(bound - share * problem.measuring_error(value), 0.0)


def _iterate(
    problem: Problem, solver: AnySolver, start: Tensor, most: int, until: float, after_step: Callable[[int, Any], None]
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
        after_step(steps, state)
    return state, status, steps


def _value(solver: AnySolver, posed: _Posed, state: Any) -> Tensor:
    """The weight that a state stands for, as the problem as it came measures it."""
    return posed.back(solver.value(posed.problem, state))
