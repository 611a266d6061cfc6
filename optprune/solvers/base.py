"""The interface of a solver and what solving returns: proposals, status, certificate and solution."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast, final

from torch import Tensor

from optprune.errors import InputError
from optprune.problems import Problem
from optprune.system.wording import shown
from optprune.work import DOUBLE, Work, eigenvectors, product, storage, sweeps


class Status(Enum):
    """Why a solver stopped. The value is a sentence with advice."""

    CONVERGED = "the solver met its own stopping rule"
    STEP_LIMIT = "the step limit was reached: raise max_steps or accept the certificate's gap"
    TIME_LIMIT = "the time limit was reached: raise max_seconds or accept the certificate's gap"
    STALLED = "no further progress is possible in this precision: try float64 or more damping"
    NONFINITE = "the answer holds NaN or infinity: check the moments and raise the damping"


@dataclass(frozen=True)
class Certificate:
    """A proved lower bound on the optimal objective of the problem, and how it is proved."""

    lower_bound: float
    proof: str


@dataclass(frozen=True)
class Record:
    """One line of a solver's history: what ran, its steps, its seconds, and the objective that the problem measured."""

    label: str
    steps: int
    seconds: float
    objective: float


@dataclass(frozen=True, eq=False)
class Solution:
    """A weight and everything known about it; objective and violation were measured by the problem."""

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
    """fallbacks taken and extra damping used: empty when everything went as asked"""

    @property
    def gap(self) -> float | None:
        """(objective - lower bound) / |objective|: at most this share is left to gain. None where nothing is proved.

        As it is proved: the bound of a solution is below its objective by what float64 may have rounded in measuring it
        and never above, so that a gap of a few roundings is the least that there is.
        """
        if self.certificate is None or self.violation > 0:
            return None
        excess = self.objective - self.certificate.lower_bound
        if excess == 0:
            return 0.0
        return excess / abs(self.objective) if self.objective else math.copysign(math.inf, excess)


P = TypeVar("P", bound=Problem)
State = TypeVar("State")


class Solver(ABC, Generic[P, State]):
    """An algorithm as four functions of a problem and a state; concrete solvers are frozen dataclasses of options.

    `solve` in run.py drives it: init once, then step until done says why to stop. P is the kind of problem that all its
    methods but `refusal` are asked about, and `accepts` says the same at run time.
    """

    accepts: ClassVar[tuple[type[Problem], ...]] = (Problem,)
    """the kinds of problems that the solver accepts, unless `why_not` has something against one of them"""

    @final
    def refusal(self, problem: Problem) -> str | None:
        """None when the solver accepts the problem, else one sentence that says why it does not."""
        if not isinstance(problem, self.accepts):
            kinds = " and ".join(kind.kind for kind in self.accepts)
            return f"it accepts {kinds} problems, and this is a {problem.kind} problem"
        return self.why_not(cast(P, problem))

    def why_not(self, problem: P) -> str | None:
        """What else there is against a problem of an accepted kind, in one sentence; None when there is nothing."""
        return None

    @abstractmethod
    def init(self, problem: P, start: Tensor) -> State:
        """The state before the first step, from a starting weight [out, in]."""

    @abstractmethod
    def step(self, problem: P, state: State) -> State:
        """The state after one more step."""

    @abstractmethod
    def done(self, problem: P, state: State) -> Status | None:
        """None to go on, else why to stop."""

    @abstractmethod
    def value(self, problem: P, state: State) -> Tensor:
        """The weight [out, in] that the state stands for."""

    def certify(self, problem: P, state: State) -> Certificate | None:
        """A lower bound on the optimum that was proved on the way, or None; of the problem as the solver met it."""
        return None

    def prove(self, problem: P, value: Tensor) -> Certificate | None:
        """A lower bound on the optimum that is proved from the answer alone, or None.

        Of the problem as it came and the answer as it is returned, not in the units and the basis in which `solve`
        poses problems: these round in the dtype of the problem, and what is proved must hold for what is measured.
        """
        return None

    def notes(self, state: State) -> tuple[str, ...]:
        """Every fallback taken, in words; empty when the method ran as asked."""
        return ()

    def history(self, state: State) -> tuple[Record, ...]:
        """What the solver remembers of the way."""
        return ()

    def exact(self, problem: P) -> bool:
        """A promise that the answer is optimal for this problem; the tests hold the solver to it unconditionally."""
        return False

    def promised_gap(self, problem: P) -> float | None:
        """A promise to be within this share of the optimum and to prove it; held to it unconditionally. None: none."""
        return None

    def monotone(self, problem: P) -> bool:
        """A promise that the answer is never worse than a feasible start; held to it unconditionally."""
        return self.exact(problem)

    @abstractmethod
    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        """Return the work of a solve for a weight [outputs, inputs]; `coupled` under a full output metric.

        The flops are an estimate, for a plan, from the options and the widths alone. They hold the measurement of the
        answer by the problem (`measuring`), which each stage of a chain has. The bytes are the peak beside the weight,
        the moments and the metric.
        """

    @property
    def keeps(self) -> int:
        """Return the bytes over in^2 that stay with the moments, for the next layer that reads the same inputs."""
        return 0

    @property
    def label(self) -> str:
        """The name in reports."""
        return type(self).__name__


AnySolver: TypeAlias = Solver[Any, Any]
"""a solver of whatever kind of problem; whether it accepts a given one, `refusal` says"""
SENSIBLE = (1e-15, 1e15)
"""between which every number of a solver's options lies: beyond, float32 has no digits or no range for what it makes"""
MOST_STEPS = 10_000
"""what whole numbers among a solver's options, which count steps, candidates or columns, are at most"""


def check_options(solver: AnySolver, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise InputError unless every number among a solver's options is positive and sensible; for `__post_init__`."""
    for option in fields(solver):  # type: ignore[arg-type]  # solvers are dataclasses by contract
        value = getattr(solver, option.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            zero = value == 0 and option.name in may_be_zero
            least, most = (1, MOST_STEPS) if isinstance(option.default, int) else SENSIBLE
            if not (zero or least <= value <= most):
                raise InputError(
                    f"{option.name} of {solver.label} must be between {least:g} and {most:g}, not {shown(value)}"
                )


def measuring(outputs: int, inputs: int, *, coupled: bool = False) -> float:
    """Return the flops of posing a problem and of measuring one answer, in float64."""
    flops = DOUBLE * product(outputs, inputs, inputs) + sweeps(50, outputs, inputs)
    if coupled:
        flops += DOUBLE * product(outputs, outputs, inputs) + eigenvectors(outputs)
    return flops


def unfitted(outputs: int, inputs: int, *, coupled: bool = False) -> float:
    """Return the bytes of a solver whose peak was not fitted: more than any fit."""
    return storage(outputs, inputs, 24.0, 80.0, 30.0 if coupled else 2.0)


@dataclass(frozen=True, eq=False)
class Answer:
    """All that a solver without iterations has to say."""

    value: Tensor
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()


class DirectSolver(Solver[P, Answer]):
    """A solver that computes its answer in one go."""

    @abstractmethod
    def answer(self, problem: P, start: Tensor) -> Answer:
        """The answer."""

    def init(self, problem: P, start: Tensor) -> Answer:
        return self.answer(problem, start)

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
