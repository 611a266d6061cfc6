"""The peak of a stretch of a run: exact where it is the largest so far, else nearly, and nothing is reset for it."""

import time
from collections.abc import Callable

import pytest
import torch

from optprune.measure import memory
from optprune.measure.memory import PeakMemory, highest_bytes, memory_increase, release, resident_bytes
from tests.helpers.memory import MIB, told

CPU = torch.device("cpu")


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """What a run takes at most, and what there was before it."""
    release()
    before = resident_bytes()
    assert before is not None
    with PeakMemory(CPU) as taken:
        run()
    assert taken.host_bytes is not None
    assert taken.device_bytes is None
    return taken.host_bytes, before


def take(size: int) -> None:
    """Hold so many MiB for longer than the resident size is looked at."""
    held = torch.ones(size * MIB // 4)
    time.sleep(5 * memory.SAMPLE_SECONDS)
    del held


@told
def test_the_peak_is_what_a_run_holds_at_most() -> None:
    take(1)
    release()
    largest, now = highest_bytes(), resident_bytes()
    assert largest is not None and now is not None
    # The first is the largest so far, the second less.
    for size in ((largest - now) // MIB + 100, 50):
        found, before = peak(lambda size=size: take(size))
        assert abs(found - before - size * MIB) < 8 * MIB
    # What other tools tell of the process is still the largest.
    assert highest_bytes() > largest + 50 * MIB  # type: ignore[operator]


@told
def test_a_run_that_takes_nothing_holds_what_was_there() -> None:
    take(200)
    found, before = peak(lambda: None)
    assert abs(found - before) < 8 * MIB


@told
def test_the_watch_ends_with_the_run() -> None:
    with pytest.raises(ZeroDivisionError), PeakMemory(CPU) as taken:
        raise ZeroDivisionError
    assert taken.host_bytes is not None
    assert not taken.watching


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "highest_bytes", lambda: None)
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    with PeakMemory(CPU) as taken:
        pass
    assert (taken.host_bytes, taken.device_bytes) == (None, None)


def test_a_system_that_tells_the_largest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "highest_bytes", lambda: 7)
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    with PeakMemory(CPU) as taken:
        pass
    assert taken.host_bytes == 7


class Cuda:
    """What torch tells of a device, as far as peaks go by it."""

    def __init__(self) -> None:
        self.held = self.highest = 0

    def hold(self, size: int) -> None:
        self.held = size
        self.highest = max(self.highest, size)

    def reset(self, _: torch.device) -> None:
        self.highest = self.held


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", cuda.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: cuda.highest)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: cuda.held)
    return cuda


def test_peaks_of_a_device_within_one_another(cuda: Cuda) -> None:
    device, found = torch.device("cuda:0"), list[int | None]()
    cuda.hold(1000)
    cuda.hold(100)

    def run() -> None:
        for size in (300, 700, 200):
            with PeakMemory(device) as taken:
                cuda.hold(size)
                cuda.hold(100)
            found.append(taken.device_bytes)

    assert memory_increase(device, run) == 600
    assert found == [300, 700, 200]
