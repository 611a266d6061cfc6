"""Packages that only some runs need, each brought by an extra."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from optprune.errors import InputError
from optprune.system.wording import install


def optional(package: str, extra: str, what: str) -> Any:
    """Return a package or its module; InputError, which names what needs it and the extra, where it is not there."""
    try:
        return import_module(package)
    except ImportError as error:
        raise _missing(package, extra, what) from error


def check_installed(package: str, extra: str, what: str) -> None:
    """Raise InputError, which names what needs it and the extra, unless a package is installed."""
    try:
        found = find_spec(package)
    except (ImportError, ValueError):  # the package around it is not installed, or it was loaded without a finder
        found = None
    if found is None:
        raise _missing(package, extra, what)


def _missing(package: str, extra: str, what: str) -> InputError:
    name = package.partition(".")[0]
    return InputError(f"{what} needs the package {name}, which is not installed: {install(extra)}")
