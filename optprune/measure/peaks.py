"""Peaks: the most memory that a stretch of a run takes, on the host and on its device.

Nothing that others read is changed on the host: what `time` or `getrusage` tell of the process stays what it was.
"""

import threading
from contextlib import suppress
from types import TracebackType

import torch

from optprune.measure.memory import DevicePeak, highest_bytes, resident_bytes

APART = 0.02
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
        while not self._over.wait(APART):
            self._seen = max(self._seen or 0, resident_bytes() or 0)
