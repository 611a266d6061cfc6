"""Events of a run on its way, and the recorder of its phases."""

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
    """A phase of the run begins, or goes on after another; its name is one of `PHASES`."""

    phase: str


@dataclass(frozen=True)
class PhasesExpected:
    """More is known of the seconds that phases to come will take."""

    seconds: Mapping[str, float]
    """the seconds of each phase, by its name"""


@dataclass(frozen=True)
class PhaseAdvanced:
    """How far a step of a phase is; nothing is done when it begins."""

    phase: str
    """the name of the phase, one of `PHASES`"""
    step: str
    """what is being done, in words such as "measuring the output metric" """
    unit: str
    """the name of what is counted, such as block"""
    done: int
    total: int
    begins: float = 0.0
    """the share of the phase's work that comes before this step"""
    ends: float = 1.0
    """the share that is done after it"""
    within: float | None = None
    """the share of the step that is done, where what is counted is not all alike"""

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
    """A phase is over, for now: what it took."""

    phase: PhaseReport


@dataclass(frozen=True)
class BlockStarted:
    """A decoder block is about to be calibrated."""

    block: int
    blocks: int
    done: int | None = None
    """how many blocks are done, where that is not all those before it"""
    layers: tuple[float, ...] = ()
    """the layers that will be solved in it, in their order: the share of the solving that each is, roughly"""


@dataclass(frozen=True)
class LayerSolved:
    """A layer's problem was solved and its answer written."""

    layer: LayerReport


@dataclass(frozen=True)
class BlockFinished:
    """A decoder block is pruned and its outputs are known."""

    block: int
    blocks: int
    seconds: float
    done: int | None = None
    """how many blocks are done, where that is not all up to it"""


@dataclass(frozen=True)
class DivergenceMeasured:
    """The predictions on held-out windows were held against the dense model's, while a model is healed."""

    step: int
    """how many steps were done by then"""
    steps: int
    divergence: float
    """KL(dense || model), in nats a prediction"""
    perplexity: float
    best: bool
    """whether no measurement before gave less"""


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
    """The phases of a run that are over, for its report."""

    def __init__(self, device: torch.device, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.device, self.on_event = device, on_event
        self.done: tuple[PhaseReport, ...] = ()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done in this context is of a phase; one that was there already goes on. An error ends it untold."""
        self.on_event(PhaseStarted(name))
        began = time.perf_counter()
        with PeakMemory(self.device) as peak:
            yield
        report = PhaseReport(name, time.perf_counter() - began, peak.host_bytes, peak.device_bytes)
        self.done = joined(self.done, [report])
        self.on_event(PhaseFinished(report))

    @contextmanager
    def step(self, name: str, what: str, ends: float = 1.0) -> Iterator[None]:
        """A phase of which only the beginning and the end are told, or a share of it that `ends` says."""
        with self.phase(name):
            self.on_event(PhaseAdvanced(name, what, "step", 0, 1, ends=ends))
            yield
            self.on_event(PhaseAdvanced(name, what, "step", 1, 1, ends=ends))
