"""Names of a package that are imported on first use."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

Get = Callable[[str], Any]
Dir = Callable[[], list[str]]


def lazy_names(package: str, modules: dict[str, tuple[str, ...]]) -> tuple[Get, Dir]:
    """Return the functions `__getattr__` and `__dir__` of a package (PEP 562).

    `modules` lists the names that each module provides, by its path in optprune.
    """
    homes = {name: f"optprune.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes)
