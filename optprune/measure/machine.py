"""What computes: the versions of the libraries, and what of a machine decides how sums are rounded."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
"""the variables that choose kernels, which round differently"""


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {
        "optprune": version("optprune"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What of a machine decides how sums are rounded."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": {key: os.environ[key] for key in KERNELS if key in os.environ},
    }
