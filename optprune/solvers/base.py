"""What every solver is. A solver proposes weights; it never scores itself, prints, seeds globally or moves devices."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from torch import Tensor

from optprune.problems import Problem
from optprune.solvers.solution import Certificate, Record, Status
from optprune.system.wording import shown

State = TypeVar("State")


class Solver(ABC, Generic[State]):
    """An algorithm as four functions of a problem and a state; concrete solvers are frozen dataclasses of options.

    `solve` in run.py drives it: init once, then step until done says why to stop.
    """

    @abstractmethod
    def why_not(self, problem: Problem) -> str | None:
        """None when the solver accepts the problem, else one sentence that says why it does not."""

    @abstractmethod
    def init(self, problem: Problem, start: Tensor) -> State:
        """The state before the first step, from a starting weight [out, in]."""

    @abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """The state after one more step."""

    @abstractmethod
    def done(self, problem: Problem, state: State) -> Status | None:
        """None to go on, else why to stop."""

    @abstractmethod
    def value(self, problem: Problem, state: State) -> Tensor:
        """The weight [out, in] that the state stands for."""

    def certify(self, problem: Problem, state: State) -> Certificate | None:
        """A proved lower bound on the problem's optimum, or None."""
        return None

    def notes(self, state: State) -> tuple[str, ...]:
        """Every fallback taken, in words; empty when the method ran as asked."""
        return ()

    def history(self, state: State) -> tuple[Record, ...]:
        """What the solver remembers of the way."""
        return ()

    def exact(self, problem: Problem) -> bool:
        """A promise that the answer is optimal for this problem; the tests hold the solver to it unconditionally."""
        return False

    def promised_gap(self, problem: Problem) -> float | None:
        """A promise to be within this share of the optimum and to prove it; held to it unconditionally. None: none."""
        return None

    def monotone(self, problem: Problem) -> bool:
        """A promise that the answer is never worse than a feasible start; held to it unconditionally."""
        return self.exact(problem)

    @property
    def label(self) -> str:
        """The name in reports."""
        return type(self).__name__


SENSIBLE = (1e-15, 1e15)
"""between which every number of a solver's options lies: beyond, float32 has no digits or no range for what it makes"""
MOST_STEPS = 10_000
"""what whole numbers among a solver's options, which count steps, candidates or columns, are at most"""


def check_options(solver: "Solver", may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless every number among a solver's options is positive and sensible; for `__post_init__`."""
    for option in fields(solver):  # type: ignore[arg-type]  # solvers are dataclasses by contract
        value = getattr(solver, option.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            zero = value == 0 and option.name in may_be_zero
            least, most = (1, MOST_STEPS) if isinstance(option.default, int) else SENSIBLE
            if not (zero or least <= value <= most):
                raise ValueError(
                    f"{option.name} of {solver.label} must be between {least:g} and {most:g}, not {shown(value)}"
                )


@dataclass(frozen=True, eq=False)
class Answer:
    """All that a solver without iterations has to say."""

    value: Tensor
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()


class DirectSolver(Solver[Answer]):
    """A solver that computes its answer in one go."""

    @abstractmethod
    def answer(self, problem: Problem, start: Tensor) -> Answer:
        """The answer."""

    def init(self, problem: Problem, start: Tensor) -> Answer:
        return self.answer(problem, start)

    def step(self, problem: Problem, state: Answer) -> Answer:
        return state

    def done(self, problem: Problem, state: Answer) -> Status | None:
        return Status.CONVERGED

    def value(self, problem: Problem, state: Answer) -> Tensor:
        return state.value

    def certify(self, problem: Problem, state: Answer) -> Certificate | None:
        return state.certificate

    def notes(self, state: Answer) -> tuple[str, ...]:
        return state.notes
