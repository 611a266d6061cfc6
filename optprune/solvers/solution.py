"""What solving returns: why it stopped, what is proved, and the measurements the problem made."""

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor


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
