"""Memory of this process and its device: sizes, peaks, and limits."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STATM, MEMORY = Path("/proc/self/statm"), Path("/proc/meminfo")
GROUP = ("memory.max", "memory.current", "inactive_file")
"""the files of a control group that tell its limit and what it uses, and the row of its statistics that can be had"""
OLD_GROUP = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""those of the first version"""
RESET_PEAK = "5"
"""what Linux takes as the order to forget the peak of the resident size (proc(5))"""


def release() -> None:
    """Give what was freed back to the system, where the C library can: glibc keeps blocks of up to 32 MiB for itself.

    Between two phases that allocate tensors of different sizes, what it keeps fits nothing and adds to the peak.
    """
    # Other systems have no such function, and Windows no such library; musl is Linux without it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def memory_increase(device: torch.device, run: Callable[[], object]) -> int | None:
    """The bytes that a run takes at most on top of what is held before it; None where the system does not tell.

    It runs once, also where nothing is told.
    """
    gc.collect()
    if device.type == "cuda":
        peak, before = DevicePeak(device), torch.cuda.memory_allocated(device)
        try:
            run()
        finally:
            highest = peak.close()
        return highest - before
    if device.type != "cpu" or not CLEAR.exists():
        run()
        return None
    # What earlier runs freed goes back to the system, or this run would get it without an increase.
    release()
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        run()
        return None
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def free_memory(device: torch.device | None = None) -> int | None:
    """The bytes that this process can still have of a device's memory, or of the host's; None where nobody tells.

    The host's is what Linux calls available, within the limits of the control groups that the process is in.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if (device is not None and device.type != "cpu") or not MEMORY.exists():
        return None
    available = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([int(available.split()[1]) * 1024, *cgroup_free_bytes(Path("/"))])


def cgroup_free_bytes(root: Path) -> Iterator[int]:
    """What is left to each control group of this process and those around it, in bytes, below a root folder.

    Of both versions (cgroups(7)); pages of files that nobody uses can be had.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        first = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        most, used, unused = OLD_GROUP if controllers else GROUP
        place = Path(path.lstrip("/"))
        for folder in (first / place, *(first / parent for parent in place.parents)):
            # A container may show its own group only, as the root.
            with suppress(OSError, ValueError):
                limit = int((folder / most).read_text())
                counts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield max(0, limit - int((folder / used).read_text()) + int(counts.get(unused, 0)))


class DevicePeak:
    """The most that tensors take on a CUDA device from here on; several may be at work, one within the other."""

    _at_work: ClassVar[list["DevicePeak"]] = []

    def __init__(self, device: torch.device) -> None:
        self.device, self._highest = device, 0
        self._note()
        torch.cuda.reset_peak_memory_stats(device)
        self._at_work.append(self)

    def close(self) -> int:
        """The peak, in bytes."""
        self._note()
        self._at_work.remove(self)
        return self._highest

    @classmethod
    def _note(cls) -> None:
        """Have each that is at work know what torch is about to forget."""
        for peak in cls._at_work:
            peak._highest = max(peak._highest, torch.cuda.max_memory_allocated(peak.device))


def resident_bytes() -> int | None:
    """The resident size of this process; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def highest_bytes() -> int | None:
    """The largest resident size of this process so far; None where the system does not tell."""
    with suppress(OSError, StopIteration):
        return status_bytes("VmHWM")
    with suppress(ImportError, OSError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def held_bytes() -> int:
    """What this process has in memory now; at most so much, where the system tells the most it has had only."""
    return resident_bytes() or highest_bytes() or 0


def status_bytes(field: str) -> int:
    """A field of this process's /proc/self/status (proc(5)), such as VmRSS, in bytes; OSError where there is none."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


SAMPLE_SECONDS = 0.02
"""the seconds between two looks at the resident size"""


class PeakMemory:
    """The most memory that is taken while this context lasts, in bytes; None where the system or the device tells none.

    `host_bytes` is the largest resident size of this process, of all that it holds and not of what is new. It is exact
    where it is the largest since the process began; where it is less, it is the largest that was seen, every 20 ms. On
    systems without /proc it is always the largest since the process began. `device_bytes` is the most that torch's
    tensors took on a CUDA device (its statistics of the peak are reset for that); None on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_bytes: int | None = None
        self.device_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._seen, self._before = resident_bytes(), highest_bytes()
        self._on_device = DevicePeak(self.device) if self.device.type == "cuda" else None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="optprune-memory", daemon=True)
        if self._seen is not None:
            with suppress(RuntimeError):  # where there may be no more threads
                self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self.watching:
            self._watch.join()
        highest, last = highest_bytes(), resident_bytes()
        if self._seen is None or last is None or (highest or 0) > (self._before or 0):
            self.host_bytes = highest
        else:
            self.host_bytes = max(self._seen, last)
        if self._on_device is not None:
            self.device_bytes = self._on_device.close()

    @property
    def watching(self) -> bool:
        """Whether the resident size is being looked at."""
        return self._watch.is_alive()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._seen = max(self._seen or 0, resident_bytes() or 0)
