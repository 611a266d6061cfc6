"""Position of a run and its remaining time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from optprune.report.events import BlockFinished, BlockStarted, Event, LayerSolved, PhaseAdvanced
from optprune.report.phases import BUDGET, EVALUATIONS, HEALING, METRIC, PRUNING

SOLVED_SHARE = 0.9
"""the share of a block's work that is done when its last layer is solved, roughly; the rest is its forward pass"""


@dataclass(frozen=True)
class Position:
    """A step of a phase, and its progress."""

    phase: str
    step: str
    """the step, in words"""
    unit: str
    """the noun of the count, such as block"""
    done: int
    total: int
    share: float
    """the share of the step that is done, including parts of the counted items"""
    begins: float = 0.0
    """the share of the phase's work before this step"""
    ends: float = 1.0
    """the share of the phase's work at the end of this step"""


class PositionTracker:
    """Tracker of the position of a run by its events."""

    def __init__(self) -> None:
        self._done = self._blocks = 0
        self._layers: list[float] = []
        """the shares of the unsolved layers of the current block"""
        self._within = 0.0

    def after(self, event: Event) -> Position | None:
        """Return the position after an event; None where the event does not change it."""
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
            self._within += SOLVED_SHARE * self._layers.pop(0)
        else:
            return None
        share = (self._done + self._within) / self._blocks
        return Position(PRUNING, "pruning", "block", self._done, self._blocks, share)


COMPUTING = (METRIC, BUDGET, PRUNING, HEALING, *EVALUATIONS)
"""the phases whose speed depends on the same arithmetic; the others read and write files, or start a process"""
TRUSTED_SHARE = 0.01
"""the share of the work after which the estimate uses the measured speed alone"""


@dataclass
class _Step:
    """A step of a phase: the shares that were done at its first and latest event, and the time between."""

    width: float
    """the share of the phase's work in the whole step"""
    first: float
    last: float
    seconds: float = 0.0
    item: float = 0.0
    """the share of the latest item, such as a block"""
    marks: list[tuple[float, float]] = field(default_factory=list)
    """pairs of a done share and the seconds until then"""

    @property
    def done(self) -> float:
        """The share of the step that was done between these events."""
        return self.last - self.first

    @property
    def rate(self) -> float:
        """The seconds of the whole step, from the later half of the done share: the load of a machine varies."""
        middle = self.first + self.done / 2
        before = [mark for mark in self.marks if mark[0] <= middle]
        share, seconds = before[-1] if before else (self.first, 0.0)
        return (self.seconds - seconds) / (self.last - share)


class TimeLeft:
    """Estimate of the remaining seconds of a run.

    `expected` has the roughly known seconds of every phase by its name, in the order of the phases; a missing phase
    counts as zero until it begins. The current phase is extrapolated from its own speed, in the later half of the done
    share; until a hundredth is done, from a geometric mean of that speed and the expected one. A coming phase takes its
    expected time; a phase in `COMPUTING` takes it times the slowdown of these phases so far.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.expected, self.clock = dict(expected), clock
        self._begun: set[str] = set()
        self._steps: dict[tuple[str, str], _Step] = {}
        self._phase: str | None = None
        self._step: _Step | None = None
        self._since = clock()
        """the time of the latest event"""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Update the expected seconds of phases."""
        self.expected |= seconds

    def begin(self, phase: str) -> None:
        """Note the start of a phase."""
        self._begun.add(phase)
        self._phase, self._step, self._since = phase, None, self.clock()

    def advance(self, phase: str, step: str, done: float, begins: float = 0.0, ends: float = 1.0) -> None:
        """Note the done share of a step, from 0 to 1; `begins` and `ends` are its place within the phase's work."""
        now = self.clock()
        if phase != self._phase:
            self.begin(phase)
        found = self._steps.setdefault((phase, step), _Step(ends - begins, done, done))
        if self._step is not None:
            self._step.seconds += now - self._since
        if done > found.last:
            found.item, found.last = done - found.last, done
            found.marks.append((done, found.seconds))
        self._step, self._since, self._ends = found, now, ends

    def end(self) -> None:
        """Note the end of the current phase."""
        self._phase = self._step = None

    @property
    def known(self) -> bool:
        """Whether there is anything to estimate from."""
        return any(self.expected.values()) or (self._step is not None and self._step.done > 0)

    def seconds(self) -> float:
        """Return the remaining seconds."""
        to_come = (phase for phase in self.expected if phase not in self._begun)
        return self._left_of_phase() + sum(self.expected[phase] * self._pace(phase) for phase in to_come)

    def _left_of_phase(self) -> float:
        """Return the remaining seconds of the current phase."""
        if self._phase is None:
            return 0.0
        waited, whole = self.clock() - self._since, self.expected.get(self._phase, 0.0) * self._pace(self._phase)
        step = self._step
        # A phase without any progress that is late by some time is expected to take as much time again.
        if step is None:
            return abs(whole - waited)
        # The seconds of the whole step: expected, then corrected by the measured speed.
        rate = whole * step.width
        if step.done > 0:
            trust = min(1.0, step.done / TRUSTED_SHARE) if rate > 0 else 1.0
            rate = step.rate**trust * rate ** (1 - trust)
        left = rate * (1 - step.last)
        # However long the current item takes, the items after it remain.
        after = max(left - rate * step.item, 0.0) if step.item else 0.0
        own = max(left - waited, after) if step.done else abs(left - waited)
        return own + (1 - self._ends) * whole

    def _pace(self, phase: str) -> float:
        """Return the slowdown of a phase against its expected time, from all phases with the same speed."""
        kind = [name for name in COMPUTING if name in self.expected] if phase in COMPUTING else [phase]
        steps = [(self.expected.get(name, 0.0), step) for (name, _), step in list(self._steps.items()) if name in kind]
        expected = sum(seconds * step.width * step.done for seconds, step in steps)
        taken = sum(step.seconds for seconds, step in steps if seconds * step.width * step.done > 0)
        if not expected or not taken:
            return 1.0
        trust = min(1.0, expected / sum(self.expected[name] for name in kind) / TRUSTED_SHARE)
        return (taken / expected) ** trust
