"""What is told while a folder is saved and checked."""

from collections.abc import Callable
from dataclasses import dataclass

from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import CHECKING, SAVING

COMPUTED = 0.3
"""the share of the saving that computing logits is, roughly, where they are to be compared"""
STARTED, COMPARED = 0.7, 0.8
"""the shares of the checking that are over, roughly, when a process has started and loaded the folder, and when it is
through all blocks; then it ends, and the folder gets its name"""


@dataclass(frozen=True)
class Progress:
    """Turns what saving and checking count into events."""

    on_event: Callable[[Event], None]
    checks: bool
    """whether logits are computed before anything is written, to be compared"""

    def computed(self, done: int, blocks: int) -> None:
        """So many blocks have given what they give to the logits."""
        step = "computing the logits to compare"
        self.on_event(PhaseAdvanced(SAVING, step, "block", done, blocks, ends=COMPUTED))

    def written(self, done: int, tensors: int) -> None:
        """So many tensors are written."""
        self.on_event(PhaseAdvanced(SAVING, "saving", "tensor", done, tensors, COMPUTED if self.checks else 0.0))

    def process_starts(self) -> None:
        """A process is about to start."""
        self.on_event(PhaseAdvanced(CHECKING, "starting a process that reloads the folder", "step", 0, 1, ends=STARTED))

    def checked(self, done: int, blocks: int) -> None:
        """The process is through so many blocks."""
        if not done:
            step = "starting a process that reloads the folder"
            self.on_event(PhaseAdvanced(CHECKING, step, "step", 1, 1, ends=STARTED))
        self.on_event(PhaseAdvanced(CHECKING, "checking", "block", done, blocks, STARTED, COMPARED))
