"""Facts: what decides the bytes of a run beside what it is given, and where two sets of facts differ."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command that only compares facts does not wait for torch
    import torch

KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
"""the variables that choose kernels, which round differently"""


def differences(before: Any, now: Any, what: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What is another in two values of plain data, by its path in them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key), now.get(key), f"{what}.{key}" if what else key)
    elif before != now:
        yield what, before, now


def versions() -> dict[str, str]:
    """The versions of what computes."""
    import torch

    return {
        "optprune": version("optprune"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine(device: "torch.device") -> dict[str, Any]:
    """What of a machine decides how sums are rounded."""
    import torch

    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": {key: os.environ[key] for key in KERNELS if key in os.environ},
    }
