"""The recorder of a run's phases, which tells of each when it begins and when it is over."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from optprune.measure.peaks import PeakMemory
from optprune.report.events import Event, PhaseAdvanced, PhaseFinished, PhaseStarted
from optprune.report.phases import PhaseReport, joined


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
