"""The memory of a run: the increase is what is allocated, and what was freed goes back to the system."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optprune.measure.memory import cgroup_free_bytes, free_memory, memory_increase, release
from tests.helpers.memory import MIB, told


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
