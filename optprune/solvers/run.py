"""The one driver: runs any solver on any problem it accepts, and lets the problem measure the answer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError, NoSolver, check_at_least, check_count, check_kind
from optprune.metric import OutputBasis
from optprune.numerics.precision import full_precision
from optprune.numerics.tensors import all_finite, check_tensor
from optprune.problems import MaskedLeastSquares, Problem
from optprune.solvers.admm import Admm
from optprune.solvers.base import (
    AnySolver,
    Certificate,
    Solution,
    Status,
    answer_of,
    bound_of,
    check_is_solver,
    notes_of,
    status_of,
)
from optprune.solvers.chain import Chain
from optprune.solvers.channel_swaps import ChannelSwaps
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.greedy_obs import GreedyObs
from optprune.solvers.grid_beam import GridBeam
from optprune.solvers.gridded import Gptq, GridDescent
from optprune.solvers.proximal_admm import ProximalAdmm
from optprune.solvers.refitted_swaps import RefittedSwaps
from optprune.solvers.restore import Restore
from optprune.solvers.swaps import Swaps
from optprune.system.own_code import own_code

ROW_FACTORS = 1e8
"""multiplications, about a tenth of a second, above which a Cholesky factor for every row is no longer worth it"""
BEAM_WEIGHTS = 512
"""weights above which a beam of roundings takes more than a second or two"""
GRADIENT_TOLERANCE = 1e-5
"""the tolerance at which conjugate gradients prove a gap of 1e-6 or less on layers of a real model, in a tenth of the
time of restoration"""


def candidates(small: bool = True, few: bool = True) -> tuple[AnySolver, ...]:
    """Return the solvers that `choose` tries, in this order; some are for small layers, or for few weights, only."""
    return (
        Chain((GreedyObs(), ChannelSwaps(), Restore())),
        ProximalAdmm(),
        *((Chain((Admm(), ConjugateGradients(), RefittedSwaps(), ConjugateGradients())),) if small else ()),
        Chain((Admm(haste=0.3), ConjugateGradients(), Swaps(), ConjugateGradients())),
        Chain((Admm(haste=0.3), ConjugateGradients())),
        Restore(),
        ConjugateGradients(),
        *((Chain((GridBeam(), GridDescent(tolerance=1e-6, sweeps=200))),) if few else ()),
        Chain((Gptq(), GridDescent())),
    )


def choose(problem: Problem, shape: tuple[int, int] | None = None) -> AnySolver:
    """Return the recommended solver for a problem. Raise NoSolver with every candidate's reason for refusing.

    `shape` is that of the layer for which the problem stands, by default its own.
    """
    check_kind("the problem", problem, Problem, PROBLEM)
    if isinstance(problem, MaskedLeastSquares) and _costly_to_factorise(problem):
        return ConjugateGradients(GRADIENT_TOLERANCE)
    reasons: list[str] = []
    rows, inputs = shape or problem.loss.weight.shape
    # Where a full metric couples the rows, all weights are one row.
    tableaus = (rows * inputs) ** 3 if problem.loss.coupled else rows * inputs**3
    for solver in candidates(small=tableaus <= ROW_FACTORS, few=rows * inputs <= BEAM_WEIGHTS):
        reason = solver.refusal(problem)
        if reason is None:
            return solver
        reasons.append(f"{solver.label}: {reason}")
    raise NoSolver(f"no solver accepts a {type(problem).__name__}; " + "; ".join(reasons))


def _costly_to_factorise(problem: MaskedLeastSquares) -> bool:
    """Return whether masks per row need too many factors, and damping lets gradients certify."""
    rows, most = problem.mask.shape[0], int(problem.mask.sum(1).max())
    damped = bool((problem.loss.damping > 0).all())
    return rows > 1 and damped and rows * most**3 > ROW_FACTORS


MOST_STEPS = 10_000
DEAD = (
    "every input was zero or below the least that the moments keep (about 1e-16 in float32), or constant beside a "
    "bias, on all tokens: any choice is as good, and nothing is restored"
)
"""the note, and the proof that the answer is optimal"""
CONTRADICTED = "the certificate was dropped"
"""the beginning of the note about a lower bound that is above the objective"""
PROBLEM = "give a problem object, e.g. SparseLeastSquares(loss, NM(2, 4))"
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

    `start` [out, in] is a warm start, by default the problem's own start; it is converted to the weight's dtype. The
    objective and the violation of the Solution are measured by the problem after the solver has returned. The rounding
    error of this measurement (`Problem.measuring_error`) is subtracted from a lower bound. A bound that is still above
    the objective is wrong: it is dropped with a note. Raises InputError where the start is not finite or has another
    shape, where the solver writes into the tensors of the loss, and where its answer has not the shape, the dtype and
    the device of the weight; NoSolver when the solver refuses the problem; OwnCodeError where code of the user's own
    fails, with its file and line.

    Under an output metric the solver works in another basis of the outputs (`Problem.in_output_basis`), and where
    weights or inputs are very large or small, in other units (`Problem.in_moderate_units`); certificates hold for the
    original problem. Where all feasible weights cost the same, as for inputs that are all zero, one near the start is
    the answer.
    """
    check_count("max_steps", max_steps)
    check_kind("max_seconds", max_seconds, Real, "give a number of seconds")
    check_at_least("max_seconds", max_seconds, 0)
    solver = choose(problem) if solver is None else solver
    with own_code():
        transformed = _Transformed.of(problem)
        check_accepted(transformed.problem, solver)
        start = _start(problem, start)
    began = time.perf_counter()
    with torch.no_grad():
        with own_code():
            any_value = problem.trivial_solution(start)
        if any_value is not None:
            objective, violation = problem.objective(any_value), problem.violation(any_value)
            proof = Certificate(_below(objective, objective, problem, any_value), DEAD)
            seconds = time.perf_counter() - began
            return Solution(any_value, objective, violation, Status.CONVERGED, 0, seconds, proof, notes=(DEAD,))

        def after_step(steps: int, state: Any) -> None:
            if callback is not None:
                callback(steps, partial(_value, solver, transformed, state))

        state, status, steps = _iterate(
            transformed.problem, solver, transformed.into(start), max_steps, began + max_seconds, after_step
        )
        value = _value(solver, transformed, state)
        with own_code():
            on_the_way = bound_of(solver, "certify", solver.certify(transformed.problem, state))
            of_answer = bound_of(solver, "prove", solver.prove(problem, value))
            certificate = _best(transformed.certificate(on_the_way), of_answer)
            seconds = time.perf_counter() - began
            objective, violation = problem.objective(value), problem.violation(value)
            notes, records = notes_of(solver, state), solver.history(state)
        if not (math.isfinite(objective) and all_finite(value)):
            status = Status.NONFINITE
        if certificate is not None and violation == 0:
            certificate, note = _not_contradicted(certificate, objective, problem, value)
            notes += note
    history = tuple(replace(one, objective=one.objective * transformed.factor) for one in records)
    return Solution(value, objective, violation, status, steps, seconds, certificate, history, notes)


def _start(problem: Problem, given: Tensor | None) -> Tensor:
    """Return a warm start in the dtype of the weight, or else the start of the problem itself."""
    weight = problem.loss.weight
    if given is None:
        return problem.start().to(weight)
    check_tensor("the start", given, weight.shape)
    if not bool(given.isfinite().all()):
        raise InputError("the start has entries that are NaN or infinite: give finite ones")
    return given.to(weight)


def check_accepted(transformed: Problem, solver: AnySolver) -> None:
    """Raise NoSolver when a solver refuses a problem, given in the basis of the outputs in which the solver runs."""
    check_is_solver(solver)
    reason = solver.refusal(transformed)
    if reason is not None:
        raise NoSolver(f"{solver.label} does not solve this problem: {reason}")


@full_precision()
def answer(problem: Problem, solver: AnySolver, start: Tensor) -> Tensor:
    """Return the value of the solution without measuring or certifying it, for the inner steps of other methods."""
    transformed = _Transformed.of(problem)
    with torch.no_grad():
        any_value = problem.trivial_solution(start)
        if any_value is not None:
            return any_value
        state, _, _ = _iterate(
            transformed.problem, solver, transformed.into(start), MOST_STEPS, math.inf, lambda steps, state: None
        )
        return _value(solver, transformed, state)


@dataclass(frozen=True, eq=False)
class _Transformed:
    """A problem in the basis of the outputs and the units of weights and inputs in which its solver runs."""

    problem: Problem
    basis: OutputBasis | None
    size: float
    """the factor of its weights"""
    factor: float
    """the factor from its objective to that of the original problem"""

    @classmethod
    def of(cls, problem: Problem) -> "_Transformed":
        check_kind("the problem", problem, Problem, PROBLEM)
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
        """Return a bound for the original problem; None in another basis of the outputs, whose conversion rounds."""
        if found is None or self.basis is not None:
            return None
        return replace(found, lower_bound=found.lower_bound * self.factor)


def _best(*found: Certificate | None) -> Certificate | None:
    """Return the certificate with the highest bound that was proved here; one that is NaN only beside no other."""
    proved = [one for one in found if one is not None and not one.stated_by_file]
    return max(proved, key=lambda one: -math.inf if math.isnan(one.lower_bound) else one.lower_bound, default=None)


def _not_contradicted(
    certificate: Certificate, objective: float, problem: Problem, value: Tensor
) -> tuple[Certificate | None, tuple[str, ...]]:
    """Return a certificate less the rounding error of the objective; none, with a note, where it is above that."""
    bound = _below(certificate.lower_bound, objective, problem, value)
    # Written so that NaN fails.
    if bound <= objective:
        return replace(certificate, lower_bound=bound), ()
    if math.isnan(certificate.lower_bound):
        return None, (f"{CONTRADICTED}: its lower bound is not a number",)
    stated = f"its lower bound {certificate.lower_bound:.6g} is above the objective {objective:.6g}"
    return None, (f"{CONTRADICTED}: {stated}",)


def _below(bound: float, objective: float, problem: Problem, value: Tensor) -> float:
    """Return a bound less the rounding error of the measured objective, in proportion for a lower bound.

    Then it is no higher than the measured objective, which is never negative.
    """
    if bound <= 0:
        return bound
    share = min(bound / objective, 1.0) if objective > 0 else 1.0
    return max(bound - share * problem.measuring_error(value), 0.0)


def _iterate(
    problem: Problem, solver: AnySolver, start: Tensor, most: int, until: float, after_step: Callable[[int, Any], None]
) -> tuple[Any, Status, int]:
    """Return the solver's last state, the reason why it stopped, and the number of steps.

    Raises InputError where the solver has written into the tensors of the loss.
    """
    versions, steps = _versions(problem), 0
    with own_code():
        state = solver.init(problem, start)
    while (status := _done(solver, problem, state)) is None:
        if steps >= most:
            status = Status.STEP_LIMIT
            break
        if time.perf_counter() >= until:
            status = Status.TIME_LIMIT
            break
        with own_code():
            state = solver.step(problem, state)
        steps += 1
        after_step(steps, state)
    if _versions(problem) != versions:
        raise InputError(
            f"{solver.label} writes into the weight or the averages of its problem, so its answer cannot be measured: "
            "let it work on copies, by clone()"
        )
    return state, status, steps


def _done(solver: AnySolver, problem: Problem, state: Any) -> Status | None:
    """Return why the solver stops, or None; an error of the user's own code with its place."""
    with own_code():
        return status_of(solver, problem, state)


def _versions(problem: Problem) -> list[int]:
    """Return the number of in-place writes to each tensor of the loss."""
    loss = problem.loss
    parts = (loss.weight, loss.damping, *loss.moments.parts())
    return [part._version for part in parts if not part.is_inference()]


def _value(solver: AnySolver, transformed: _Transformed, state: Any) -> Tensor:
    """Return the weight of a state, in the basis and the units of the original problem."""
    with own_code():
        value = answer_of(solver, transformed.problem, state)
    return transformed.back(value)
