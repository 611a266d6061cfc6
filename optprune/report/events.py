"""Events that a run reports while it works, and the recorder of its phases."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from optprune.measure.memory import PeakMemory
from optprune.report.phases import PhaseReport, joined
from optprune.report.records import LayerReport


@dataclass(frozen=True)
class PhaseStarted:
    """Start of a phase in `PHASES`, or its continuation after another phase."""

    phase: str


@dataclass(frozen=True)
class PhasesExpected:
    """Better estimates of the seconds of coming phases."""

    seconds: Mapping[str, float]
    """seconds by the name of the phase"""


@dataclass(frozen=True)
class PhaseAdvanced:
    """Progress of a step of a phase; the first event of a step has `done` 0."""

    phase: str
    """the name of the phase, one of `PHASES`"""
    step: str
    """the step in words, such as "measuring the output metric" """
    unit: str
    """the noun of the count, such as block"""
    done: int
    total: int
    begins: float = 0.0
    """the share of the phase's work before this step"""
    ends: float = 1.0
    """the share of the phase's work at the end of this step"""
    within: float | None = None
    """the share of the step that is done, where the counted items differ in size"""

    @property
    def share_of_step(self) -> float:
        """The share of the step that is done."""
        return self.within if self.within is not None else self.done / self.total if self.total else 1.0

    @property
    def share(self) -> float:
        """The share of the phase's work that is done."""
        return self.begins + (self.ends - self.begins) * self.share_of_step


@dataclass(frozen=True)
class PhaseFinished:
    """End of a phase, with its time and memory; the phase may continue later."""

    phase: PhaseReport


@dataclass(frozen=True)
class BlockStarted:
    """Start of the work on a decoder block."""

    block: int
    blocks: int
    done: int | None = None
    """the number of finished blocks, where blocks are not pruned in order"""
    layers: tuple[float, ...] = ()
    """the share of the solving time of each layer of the block, roughly, in order"""


@dataclass(frozen=True)
class LayerSolved:
    """Solution of a layer, written to the model."""

    layer: LayerReport


@dataclass(frozen=True)
class BlockFinished:
    """End of the work on a decoder block."""

    block: int
    blocks: int
    seconds: float
    done: int | None = None
    """the number of finished blocks, where blocks are not pruned in order"""


@dataclass(frozen=True)
class DivergenceMeasured:
    """Divergence from the dense model on held-out windows, measured during healing."""

    step: int
    """the number of training steps so far"""
    steps: int
    divergence: float
    """KL(dense || model), in nats a prediction"""
    perplexity: float
    best: bool
    """whether this is the best state so far"""


Event = (
    PhasesExpected
    | PhaseStarted
    | PhaseAdvanced
    | PhaseFinished
    | BlockStarted
    | LayerSolved
    | BlockFinished
    | DivergenceMeasured
)


class PhaseRecorder:
    """Recorder of the time and memory of each phase of a run."""

    def __init__(self, device: torch.device, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.device, self.on_event = device, on_event
        self.done: tuple[PhaseReport, ...] = ()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the work in this context as a phase, or as more of it. After an error nothing is recorded."""
        self.on_event(PhaseStarted(name))
        began = time.perf_counter()
        with PeakMemory(self.device) as peak:
            yield
        report = PhaseReport(name, time.perf_counter() - began, peak.host_bytes, peak.device_bytes)
        self.done = joined(self.done, [report])
        self.on_event(PhaseFinished(report))

    @contextmanager
    def step(self, name: str, what: str, ends: float = 1.0) -> Iterator[None]:
        """Record a phase of a single step, or the share of it up to `ends`."""
        with self.phase(name):
            self.on_event(PhaseAdvanced(name, what, "step", 0, 1, ends=ends))
            yield
            self.on_event(PhaseAdvanced(name, what, "step", 1, 1, ends=ends))
