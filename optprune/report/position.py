"""Where a run stands, by what it tells: the position that progress is drawn from and time left is estimated by."""

from dataclasses import dataclass

from optprune.report.events import BlockFinished, BlockStarted, Event, LayerSolved, PhaseAdvanced
from optprune.report.phases import PRUNING

SOLVING = 0.9
"""the share of a block's work that is done, roughly, when its last layer is solved; then comes the way to the next"""


@dataclass(frozen=True)
class Position:
    """A step of a phase, and how far it is."""

    phase: str
    step: str
    """what is being done, in words"""
    unit: str
    """the name of what is counted"""
    done: int
    total: int
    share: float
    """the share of the step that is done, parts of what is counted too"""
    begins: float = 0.0
    """the share of the phase's work that comes before this step"""
    ends: float = 1.0
    """the share that is done after it"""


class Positions:
    """Tells the position after each event of a run."""

    def __init__(self) -> None:
        self._done = self._blocks = 0
        self._layers: list[float] = []
        """the shares of the layers that are still to be solved in the block at work"""
        self._within = 0.0

    def after(self, event: Event) -> Position | None:
        """Where the run stands now; None where the event tells nothing of it."""
        if isinstance(event, PhaseAdvanced):
            counts = event.unit, event.done, event.total, min(event.share_of_step, 1.0)
            return Position(event.phase, event.step, *counts, event.begins, event.ends)
        if isinstance(event, BlockStarted):
            self._blocks, self._done = event.blocks, event.block if event.done is None else event.done
            self._layers, self._within = list(event.layers), 0.0
        elif isinstance(event, BlockFinished):
            self._blocks, self._done = event.blocks, event.block + 1 if event.done is None else event.done
            self._layers, self._within = [], 0.0
        elif isinstance(event, LayerSolved) and self._layers:
            self._within += SOLVING * self._layers.pop(0)
        else:
            return None
        share = (self._done + self._within) / self._blocks
        return Position(PRUNING, "pruning", "block", self._done, self._blocks, share)
