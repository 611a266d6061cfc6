"""Phases of a run: their names, and the time and memory of each."""

from collections.abc import Iterable
from dataclasses import dataclass

LOADING, TOKENISING, METRIC, BUDGET, PRUNING, SAVING, CHECKING = PHASES = (
    "loading",
    "tokenising",
    "metric",
    "budget",
    "pruning",
    "saving",
    "checking",
)
"""the phases of a command: load the model, tokenise the text, measure the output metric, allocate the budget, prune the
blocks, save the folder, check the saved folder. The function `prune` has three to five of them"""
GENERATING = "generating"
"""the phase in which the dense model generates further calibration text, where the command asks for it"""
CHOOSING = "choosing"
"""the phase in which the tokens of a smaller vocabulary are chosen by the text and by the dense model's predictions"""
VOCABULARY = "vocabulary"
"""the phase in which a smaller vocabulary takes over the probability of the removed tokens"""
EARLIER = "earlier processes"
"""the phase that stands for the work which earlier processes of a resumed run have finished"""
HEALING = "healing"
"""the phase in which a pruned model is trained"""
EVALUATIONS = (
    "evaluating the original",
    "evaluating the pruned model",
    "evaluating the reloaded folder",
)
"""the phases of evaluation in `optprune demo`"""


@dataclass(frozen=True)
class PhaseReport:
    """Time and memory of a phase."""

    name: str
    seconds: float
    host_bytes: int | None
    """the largest resident size of this process during the phase; None where the system does not report it. The memory
    of workers and of the process that checks a folder is not included"""
    device_bytes: int | None
    """the peak of allocated tensors on the model's CUDA device; None on the CPU"""

    def and_then(self, other: "PhaseReport") -> "PhaseReport":
        """Return the phase joined with a later part of it."""
        host = _largest(self.host_bytes, other.host_bytes)
        device = _largest(self.device_bytes, other.device_bytes)
        return PhaseReport(self.name, self.seconds + other.seconds, host, device)


def joined(*several: Iterable[PhaseReport]) -> tuple[PhaseReport, ...]:
    """Return the phases in order; parts of one phase are joined, at the place of the first."""
    found: dict[str, PhaseReport] = {}
    for phase in (phase for phases in several for phase in phases):
        found[phase.name] = found[phase.name].and_then(phase) if phase.name in found else phase
    return tuple(found.values())


def _largest(first: int | None, second: int | None) -> int | None:
    return max((size for size in (first, second) if size is not None), default=None)
