"""The interface of solvers, and the result of solving: status, certificate and solution."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast, final

from torch import Tensor

from optprune.errors import InputError, check_kind
from optprune.numerics.tensors import check_tensor
from optprune.problems import Problem
from optprune.system.wording import shown
from optprune.work import DOUBLE, Work, eigenvectors, product, storage, sweeps


class Status(Enum):
    """The reason why a solver stopped. The value is a sentence with advice."""

    CONVERGED = "the solver met its own stopping rule"
    STEP_LIMIT = "the step limit was reached: raise max_steps or accept the certificate's gap"
    TIME_LIMIT = "the time limit was reached: raise max_seconds or accept the certificate's gap"
    STALLED = "no further progress is possible in this precision: try float64 or more damping"
    NONFINITE = "the answer holds NaN or infinity: check the moments and raise the damping"


@dataclass(frozen=True)
class Certificate:
    """A lower bound on the optimal objective of the problem, and the method of its proof."""

    lower_bound: float
    proof: str
    stated_by_file: bool = False
    """whether the bound was read from a file and not proved here"""

    def __post_init__(self) -> None:
        check_kind("the lower bound of a certificate", self.lower_bound, Real, "give a number")
        check_kind("the proof of a certificate", self.proof, str, "name the method in words")


@dataclass(frozen=True)
class Record:
    """A stage of a solver's history: its label, steps and seconds, and the objective that the problem measured."""

    label: str
    steps: int
    seconds: float
    objective: float


@dataclass(frozen=True, eq=False)
class Solution:
    """A weight with the objective and the violation that the problem measured, and how it was found."""

    value: Tensor
    objective: float
    violation: float
    status: Status
    steps: int
    seconds: float
    certificate: Certificate | None = None
    history: tuple[Record, ...] = ()
    """the stages of a chain before the last"""
    notes: tuple[str, ...] = ()
    """fallbacks taken and extra damping used; empty when the method ran as asked"""

    @property
    def gap(self) -> float | None:
        """(objective - lower bound) / |objective|, the most that can be gained; None where nothing is proved here.

        The bound of a solution is lowered by the rounding error of measuring its objective, so the smallest possible
        gap is a few roundings.
        """
        if self.certificate is None or self.certificate.stated_by_file or self.violation > 0:
            return None
        excess = self.objective - self.certificate.lower_bound
        if excess == 0:
            return 0.0
        return excess / abs(self.objective) if self.objective else math.copysign(math.inf, excess)


P = TypeVar("P", bound=Problem)
State = TypeVar("State")


class Solver(ABC, Generic[P, State]):
    """An algorithm as four functions of a problem and a state; concrete solvers are frozen dataclasses of options.

    `solve` in run.py calls init once, then step until done returns a status. P is the kind of problem that all
    methods but `refusal` take, and `accepts` names it at run time.
    """

    accepts: ClassVar[tuple[type[Problem], ...]] = (Problem,)
    """the kinds of problems that the solver accepts, unless `unsupported` returns a reason against one of them"""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "why_not" in vars(cls):
            raise TypeError(f"{cls.__name__} defines why_not, which is called unsupported now: rename it")

    @final
    def refusal(self, problem: Problem) -> str | None:
        """Return None when the solver accepts the problem, else one sentence with the reason why it does not."""
        if not isinstance(problem, self.accepts):
            kinds = " and ".join(kind.kind for kind in self.accepts)
            return f"it accepts {kinds} problems, and this is a {problem.kind} problem"
        return self.unsupported(cast(P, problem))

    def unsupported(self, problem: P) -> str | None:
        """Return why a problem of an accepted kind is not supported, in one sentence; None when it is."""
        return None

    @abstractmethod
    def init(self, problem: P, start: Tensor) -> State:
        """Return the state before the first step, from a starting weight [out, in]."""

    @abstractmethod
    def step(self, problem: P, state: State) -> State:
        """Return the state after one more step."""

    @abstractmethod
    def done(self, problem: P, state: State) -> Status | None:
        """Return None to continue, or the reason to stop."""

    @abstractmethod
    def value(self, problem: P, state: State) -> Tensor:
        """Return the weight [out, in] of the state."""

    def certify(self, problem: P, state: State) -> Certificate | None:
        """Return a lower bound proved during the iterations, on the optimum of the transformed problem, or None."""
        return None

    def prove(self, problem: P, value: Tensor) -> Certificate | None:
        """Return a lower bound on the optimum that is proved from the answer alone, or None.

        It holds for the original problem and the returned answer, not in the units and the basis in which the solver
        runs: their conversion rounds in the dtype of the problem, and the bound must hold for the measured objective.
        """
        return None

    def notes(self, state: State) -> tuple[str, ...]:
        """Return every fallback taken, in words; empty when the method ran as asked."""
        return ()

    def history(self, state: State) -> tuple[Record, ...]:
        """Return the records of the finished stages."""
        return ()

    def exact(self, problem: P) -> bool:
        """Return whether the answer is promised to be optimal for this problem; tests check the promise always."""
        return False

    def promised_gap(self, problem: P) -> float | None:
        """Return the relative gap that is promised and proved, or None; tests check the promise always."""
        return None

    def monotone(self, problem: P) -> bool:
        """Return whether the answer is promised to be no worse than a feasible start; tests check it always."""
        return self.exact(problem)

    @abstractmethod
    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        """Return the work of a solve for a weight [outputs, inputs]; `coupled` means a full output metric.

        The flops are an estimate, for a plan, from the options and the widths alone. They include the measurement of
        the answer by the problem (`measuring`), in each stage of a chain. The bytes are the peak beside the weight, the
        moments and the metric.
        """

    @property
    def cached_bytes(self) -> int:
        """The bytes over in^2 that are cached with the moments, for the next layer with the same inputs."""
        return 0

    @property
    def label(self) -> str:
        """The name in reports."""
        return type(self).__name__


AnySolver: TypeAlias = Solver[Any, Any]
"""a solver of any kind of problem; `refusal` tells whether it accepts a given one"""


def check_is_solver(solver: AnySolver) -> None:
    """Raise InputError where a name or a class is given in place of a solver."""
    check_kind("the solver", solver, Solver, "give an instance, e.g. SparseGpt()")


def answer_of(solver: AnySolver, problem: Problem, state: Any) -> Tensor:
    """Return the weight of a solver's state; InputError unless it has the shape, dtype and device of the problem's."""
    value, weight, what = solver.value(problem, state), problem.loss.weight, f"the answer of {solver.label}"
    check_tensor(what, value, weight.shape)
    if value.dtype != weight.dtype or value.device != weight.device:
        raise InputError(
            f"{what} is {value.dtype} on {value.device}, but the weight of the problem is {weight.dtype} on "
            f"{weight.device}: convert the answer, by .to(problem.loss.weight)"
        )
    return value


def status_of(solver: AnySolver, problem: Problem, state: Any) -> Status | None:
    """Return why a solver stops, or None; InputError where it returns something else."""
    found = solver.done(problem, state)
    if found is not None:
        check_kind(f"what done of {solver.label} returns", found, Status, "return None to go on, or a Status to stop")
    return found


def bound_of(solver: AnySolver, name: str, found: object) -> Certificate | None:
    """Return what a method of a solver has returned as a bound; InputError where that is something else."""
    if found is not None:
        check_kind(f"what {name} of {solver.label} returns", found, Certificate, "return a Certificate, or None")
    return cast(Certificate | None, found)


def notes_of(solver: AnySolver, state: Any) -> tuple[str, ...]:
    """Return the notes of a solver; InputError where it returns something else."""
    found = cast(Any, solver.notes(state))
    given: tuple[Any, ...] = cast("tuple[Any, ...]", found) if isinstance(found, tuple) else (None,)
    if not all(isinstance(note, str) for note in given):
        raise InputError(f"what notes of {solver.label} returns cannot be {shown(cast(Any, found))}: return sentences")
    return given


SENSIBLE = (1e-15, 1e15)
"""the limits of the numbers among a solver's options; beyond them results leave the digits or the range of float32"""
MOST_STEPS = 10_000
"""the limit of whole numbers among a solver's options, which count steps, candidates or columns"""


def check_options(solver: AnySolver, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise InputError unless every number among a solver's options is positive and sensible; for `__post_init__`."""
    for option in fields(solver):  # type: ignore[arg-type]  # solvers are dataclasses by contract
        value, whole = getattr(solver, option.name), isinstance(option.default, int)
        if isinstance(option.default, bool) or not isinstance(option.default, int | float):
            continue
        kind, remedy = (Integral, "give a whole number") if whole else (Real, "give a number")
        check_kind(f"{option.name} of {solver.label}", value, kind, remedy)
        zero = value == 0 and option.name in may_be_zero
        least, most = (1, MOST_STEPS) if whole else SENSIBLE
        if not (zero or least <= value <= most):
            raise InputError(
                f"{option.name} of {solver.label} must be between {least:g} and {most:g}, not {shown(value)}"
            )


def measuring(outputs: int, inputs: int, *, coupled: bool = False) -> float:
    """Return the flops of transforming a problem and of measuring one answer, in float64."""
    flops = DOUBLE * product(outputs, inputs, inputs) + sweeps(50, outputs, inputs)
    if coupled:
        flops += DOUBLE * product(outputs, outputs, inputs) + eigenvectors(outputs)
    return flops


def unfitted(outputs: int, inputs: int, *, coupled: bool = False) -> float:
    """Return the bytes of a solver whose peak was not fitted: more than any fit."""
    return storage(outputs, inputs, 24.0, 80.0, 30.0 if coupled else 2.0)


@dataclass(frozen=True, eq=False)
class Answer:
    """The result of a solver without iterations."""

    value: Tensor
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()


class DirectSolver(Solver[P, Answer]):
    """A solver without iterations."""

    @abstractmethod
    def answer(self, problem: P, start: Tensor) -> Answer:
        """Return the answer."""

    def init(self, problem: P, start: Tensor) -> Answer:
        found = self.answer(problem, start)
        check_kind(f"the answer of {self.label}", found, Answer, "return Answer(weight)")
        return found

    def step(self, problem: P, state: Answer) -> Answer:
        return state

    def done(self, problem: P, state: Answer) -> Status | None:
        return Status.CONVERGED

    def value(self, problem: P, state: Answer) -> Tensor:
        return state.value

    def certify(self, problem: P, state: Answer) -> Certificate | None:
        return state.certificate

    def notes(self, state: Answer) -> tuple[str, ...]:
        return state.notes
