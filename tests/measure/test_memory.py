"""Memory: increases and peaks, free bytes, and the return of freed blocks to the system."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optprune.measure import memory
from optprune.measure.memory import (
    PeakMemory,
    cgroup_free_bytes,
    free_memory,
    highest_bytes,
    memory_increase,
    release,
    resident_bytes,
)
from tests.helpers.memory import MIB, told


@pytest.mark.e2e
@told
@pytest.mark.parametrize("size", [1, 64, 200])
def test_the_increase_of_memory_is_what_is_allocated(size: int) -> None:
    def run() -> None:
        torch.ones(size * MIB // 4)

    run()  # what torch loads for the first tensor of all is not counted
    for _ in range(3):  # what an earlier run freed must not hide the next
        found = memory_increase(torch.device("cpu"), run)
        assert found is not None
        assert abs(found - size * MIB) < 2 * MIB  # Linux counts resident pages in batches


@told
def test_small_blocks_that_were_freed_count_again() -> None:
    def run() -> None:
        [torch.ones(4096) for _ in range(4000)]

    for _ in range(2):
        found = memory_increase(torch.device("cpu"), run)
        assert found is not None
        assert found > 4000 * 4096 * 4 * 0.9


@told
def test_what_is_released_does_not_add_to_what_comes_next() -> None:
    def run(between: Callable[[], None]) -> int:
        def phases() -> None:
            # Every other block goes, so none of what is free is at the end of the heap or large enough.
            held = [torch.ones(MIB // 16 // 4) for _ in range(2000)][::2]
            between()
            held += [torch.ones(MIB // 10 // 4) for _ in range(600)]

        found = memory_increase(torch.device("cpu"), phases)
        assert found is not None
        return found

    kept, released = run(lambda: None), run(release)
    assert abs(released - 125 * MIB) < 8 * MIB  # 2000 blocks of 1/16 MiB; half of them and 600 of 1/10 are less
    assert kept - released > 50 * MIB


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_keep_what_they_keep(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: None) -> None:
        raise TypeError("there is no such library")

    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("ctypes.CDLL", missing)
    release()


def test_a_c_library_without_the_function_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    release()


def group(root: Path, folder: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_control_groups_leave_is_told(tmp_path: Path) -> None:
    """Of both versions; a group without a limit, or that is not shown, tells nothing."""
    assert list(cgroup_free_bytes(tmp_path)) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu,cpuacct:/a\n5:memory:/a/b\n0::/c/d\n")
    group(tmp_path, "memory/a", {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700"})
    group(tmp_path, "memory/a", {"memory.stat": "cache 5\ntotal_inactive_file 50\n"})
    group(tmp_path, "c/d", {"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "inactive_file 50\n"})
    group(tmp_path, "c", {"memory.max": "2000\n", "memory.current": "700\n", "memory.stat": "inactive_file 50\n"})
    assert list(cgroup_free_bytes(tmp_path)) == [350, 1350]


@told
def test_free_memory_is_less_than_the_machine_s() -> None:
    free = free_memory()
    assert free is not None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_memory(torch.device("meta")) is None


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
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    monkeypatch.setattr(memory, "highest_bytes", lambda: 7)
    taken = PeakMemory(CPU)
    with taken:
        pass
    assert taken.host_bytes == 7
    monkeypatch.setattr(memory, "highest_bytes", lambda: None)
    with taken:
        assert not taken.watching, "there is nothing to sample"
    assert (taken.host_bytes, taken.device_bytes) == (None, None), "and not what an earlier run took"


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
