"""The memory of this process: what a run takes at most, and giving back what is free."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
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


def status_bytes(field: str) -> int:
    """A field of this process's /proc/self/status (proc(5)), such as VmRSS, in bytes; OSError where there is none."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
