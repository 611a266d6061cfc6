"""The memory of this process: what a run takes at most, and giving back what is free."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

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
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
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
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def resident_bytes() -> int:
    """What this process has in memory now; at most so much, where the system tells the most it has had only."""
    if STATUS.exists():
        return _status("VmRSS")
    import resource  # not on Windows

    # In KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    """A field of the process's status in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
