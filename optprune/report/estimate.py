"""Position of a run, and the time that it has left."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from optprune.report.events import BlockFinished, BlockStarted, Event, LayerSolved, PhaseAdvanced
from optprune.report.phases import BUDGET, EVALUATIONS, HEALING, METRIC, PRUNING

SOLVED_SHARE = 0.9
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


class PositionTracker:
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
            self._within += SOLVED_SHARE * self._layers.pop(0)
        else:
            return None
        share = (self._done + self._within) / self._blocks
        return Position(PRUNING, "pruning", "block", self._done, self._blocks, share)


COMPUTING = (METRIC, BUDGET, PRUNING, HEALING, *EVALUATIONS)
"""the phases that are slow or fast together; the others read and write files, or start a process"""
TRUSTED_SHARE = 0.01
"""the share of the work from which on its own speed is believed, and not what was expected of it"""


@dataclass
class _Step:
    """A step of a phase: the shares of it that were done when it was met first and last, and the time between."""

    width: float
    """the share of the phase's work that the whole step is"""
    first: float
    last: float
    seconds: float = 0.0
    item: float = 0.0
    """the share that was done last at one go, such as a block's"""
    marks: list[tuple[float, float]] = field(default_factory=list)
    """the shares that were done, and the seconds that they had taken by then"""

    @property
    def done(self) -> float:
        """The share of the step that was seen being done."""
        return self.last - self.first

    @property
    def rate(self) -> float:
        """The seconds that the whole step would take, by the later half of what was done: machines become busy."""
        middle = self.first + self.done / 2
        before = [mark for mark in self.marks if mark[0] <= middle]
        share, seconds = before[-1] if before else (self.first, 0.0)
        return (self.seconds - seconds) / (self.last - share)


class TimeLeft:
    """An estimate of the seconds that are left of a run.

    `expected` has the seconds of every phase by its name, in the order of the phases, as good or as bad as they may be
    known: one that is missing counts for nothing until it begins. The phase at work is extrapolated from its own speed,
    in the later half of what is done; until a hundredth of it is done, from the geometric mean of that and of what was
    expected. The phases to come are
    what was expected of them; the metric, the budget and the blocks, which are slow or fast together, times how much
    longer than expected they have taken so far.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.expected, self.clock = dict(expected), clock
        self._begun: set[str] = set()
        self._steps: dict[tuple[str, str], _Step] = {}
        self._phase: str | None = None
        self._step: _Step | None = None
        self._since = clock()
        """when it was last heard of progress"""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """More is known of what phases to come will take."""
        self.expected |= seconds

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self._begun.add(phase)
        self._phase, self._step, self._since = phase, None, self.clock()

    def advance(self, phase: str, step: str, done: float, begins: float = 0.0, ends: float = 1.0) -> None:
        """A share of a step is done, in 0 to 1; the step goes from one share of its phase's work to another."""
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
        """The phase at work is over."""
        self._phase = self._step = None

    @property
    def known(self) -> bool:
        """Whether there is anything to estimate from."""
        return any(self.expected.values()) or (self._step is not None and self._step.done > 0)

    def seconds(self) -> float:
        """The seconds that are left now."""
        to_come = (phase for phase in self.expected if phase not in self._begun)
        return self._left_of_phase() + sum(self.expected[phase] * self._pace(phase) for phase in to_come)

    def _left_of_phase(self) -> float:
        """What is left of the phase at work."""
        if self._phase is None:
            return 0.0
        waited, whole = self.clock() - self._since, self.expected.get(self._phase, 0.0) * self._pace(self._phase)
        step = self._step
        # What nothing was seen of yet, and is late by so much, is late by as much again.
        if step is None:
            return abs(whole - waited)
        # The seconds of the whole step: by what was expected, and by its own speed.
        rate = whole * step.width
        if step.done > 0:
            believed = min(1.0, step.done / TRUSTED_SHARE) if rate > 0 else 1.0
            rate = step.rate**believed * rate ** (1 - believed)
        left = rate * (1 - step.last)
        # However long the part at work takes, those behind it are still to do.
        behind = max(left - rate * step.item, 0.0) if step.item else 0.0
        own = max(left - waited, behind) if step.done else abs(left - waited)
        return own + (1 - self._ends) * whole

    def _pace(self, phase: str) -> float:
        """How much longer a phase takes than expected, by the steps that were seen of all that go with it."""
        kind = [name for name in COMPUTING if name in self.expected] if phase in COMPUTING else [phase]
        steps = [(self.expected.get(name, 0.0), step) for (name, _), step in list(self._steps.items()) if name in kind]
        expected = sum(seconds * step.width * step.done for seconds, step in steps)
        taken = sum(step.seconds for seconds, step in steps if seconds * step.width * step.done > 0)
        if not expected or not taken:
            return 1.0
        believed = min(1.0, expected / sum(self.expected[name] for name in kind) / TRUSTED_SHARE)
        return (taken / expected) ** believed
