"""The phases of a run: their names, and what each took."""

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
"""the names of the phases: the model is loaded, the text tokenised, the output metric measured, the budget divided over
the blocks, the blocks pruned, the folder saved, and what was saved checked; `prune` by itself has three to five"""
HEALING = "healing"
"""the name of the phase in which a pruned model is trained, which is no part of pruning one"""
EVALUATIONS = (
    "evaluating the original",
    "evaluating the pruned model",
    "evaluating the reloaded folder",
)
"""the names of the phases in which a run that evaluates its model too does so"""


@dataclass(frozen=True)
class PhaseReport:
    """What a phase took."""

    name: str
    seconds: float
    host_bytes: int | None
    """the largest resident size of this process meanwhile, its whole size and not what is new; None where the system
    does not tell. Workers and the process that checks a folder have memory of their own"""
    device_bytes: int | None
    """the most that tensors took meanwhile on the model's CUDA device; None on the CPU"""

    def and_then(self, other: "PhaseReport") -> "PhaseReport":
        """The phase together with more of it."""
        host = _largest(self.host_bytes, other.host_bytes)
        device = _largest(self.device_bytes, other.device_bytes)
        return PhaseReport(self.name, self.seconds + other.seconds, host, device)


def joined(*several: Iterable[PhaseReport]) -> tuple[PhaseReport, ...]:
    """Phases one after the other; what is there of a phase more than once is one, at its first place."""
    found: dict[str, PhaseReport] = {}
    for phase in (phase for phases in several for phase in phases):
        found[phase.name] = found[phase.name].and_then(phase) if phase.name in found else phase
    return tuple(found.values())


def _largest(first: int | None, second: int | None) -> int | None:
    return max((size for size in (first, second) if size is not None), default=None)
