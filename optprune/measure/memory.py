"""Memory of this process and its device, and a clock that waits for the device."""

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STATM, MEMORY = Path("/proc/self/statm"), Path("/proc/meminfo")
GROUP = ("memory.max", "memory.current", "inactive_file")
"""the files of a control group with its limit and its usage, and the row of its statistics with reclaimable bytes"""
OLD_GROUP = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""the same for control groups of the first version"""
RESET_PEAK = "5"
"""the text that resets the peak of the resident size under Linux (proc(5))"""


def clock(device: torch.device) -> float:
    """Return the time in seconds after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release() -> None:
    """Return freed memory to the system, if the C library can: glibc keeps freed blocks of up to 32 MiB.

    Kept blocks do not fit the tensors of a later phase with other sizes, and would add to its peak.
    """
    # Only glibc under Linux has the function.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def memory_increase(device: torch.device, run: Callable[[], object]) -> int | None:
    """Run a function once, and return its peak of memory in bytes over that before; None if the system reports none.

    On a CPU this resets the peak of the resident size of the process.
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
    # The run would use blocks that were freed earlier without an increase.
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
    """Return the bytes that this process can still allocate on a device, or on the host; None if unknown.

    On the host these are the available bytes by Linux, within the limits of the control groups of the process.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved and does not use is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if (device is not None and device.type != "cpu") or not MEMORY.exists():
        return None
    available = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([int(available.split()[1]) * 1024, *cgroup_free_bytes(Path("/"))])


def cgroup_free_bytes(root: Path) -> Iterator[int]:
    """Yield the free bytes of each control group of this process and its parents, below a root folder.

    Both versions of control groups are read (cgroups(7)); inactive pages of files count as free.
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
            # A container may show only its own group, as the root.
            with suppress(OSError, ValueError):
                limit = int((folder / most).read_text())
                counts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield max(0, limit - int((folder / used).read_text()) + int(counts.get(unused, 0)))


class DevicePeak:
    """Peak of allocated tensors on a CUDA device since its creation; several may be nested."""

    _active: ClassVar[list["DevicePeak"]] = []

    def __init__(self, device: torch.device) -> None:
        self.device, self._highest = device, 0
        self._note()
        torch.cuda.reset_peak_memory_stats(device)
        self._active.append(self)

    def close(self) -> int:
        """Stop, and return the peak in bytes."""
        self._note()
        self._active.remove(self)
        return self._highest

    @classmethod
    def _note(cls) -> None:
        """Save the peak for all active objects before torch resets it."""
        for peak in cls._active:
            peak._highest = max(peak._highest, torch.cuda.max_memory_allocated(peak.device))


def resident_bytes() -> int | None:
    """Return the resident size of this process in bytes; None if unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def highest_bytes() -> int | None:
    """Return the largest resident size of this process so far in bytes; None if unknown."""
    with suppress(OSError, StopIteration):
        return status_bytes("VmHWM")
    with suppress(ImportError, OSError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def held_bytes() -> int:
    """Return the resident size of this process, or its peak where only that is known; 0 if unknown."""
    return resident_bytes() or highest_bytes() or 0


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status (proc(5)), such as VmRSS, in bytes; OSError without that file."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


SAMPLE_SECONDS = 0.02
"""the seconds between two samples of the resident size"""


class PeakMemory:
    """Peak of memory within a context, in bytes; None if unknown.

    `host_bytes` is the largest resident size of this process, not its increase. It is exact if it is the largest since
    the start of the process, and else the largest of samples every 20 ms, so that the statistics that `time` and
    `getrusage` report are not reset. Without /proc it is always the largest since the start of the process.
    `device_bytes` is the peak of torch's tensors on a CUDA device, whose peak statistics are reset; None on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_bytes: int | None = None
        self.device_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._largest, self._before = resident_bytes(), highest_bytes()
        self._on_device = DevicePeak(self.device) if self.device.type == "cuda" else None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._sample, name="optprune-memory", daemon=True)
        if self._largest is not None:
            with suppress(RuntimeError):  # the limit of threads is reached
                self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self.watching:
            self._watch.join()
        highest, last = highest_bytes(), resident_bytes()
        if self._largest is None or last is None or (highest or 0) > (self._before or 0):
            self.host_bytes = highest
        else:
            self.host_bytes = max(self._largest, last)
        if self._on_device is not None:
            self.device_bytes = self._on_device.close()

    @property
    def watching(self) -> bool:
        """Whether samples of the resident size are taken."""
        return self._watch.is_alive()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._largest = max(self._largest or 0, resident_bytes() or 0)
