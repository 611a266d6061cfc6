"""Public names: those of a package that are imported on first use, and those that were renamed."""

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

Get = Callable[[str], Any]
Dir = Callable[[], list[str]]
Function = TypeVar("Function", bound=Callable[..., Any])


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]], renamed: Mapping[str, str] = {}
) -> tuple[Get, Dir]:
    """Return the functions `__getattr__` and `__dir__` of a package (PEP 562).

    `modules` lists the names that each module provides, by its path in optprune; `renamed` the new names by old ones.
    """
    homes = {name: f"optprune.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in renamed:
            _warn(f"{package}.{name}", f"{package}.{renamed[name]}")
            name = renamed[name]
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes)


def renamed_argument(old: str, new: str) -> Callable[[Function], Function]:
    """Return a decorator by which a function still takes an argument by its old name, with a warning."""

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            if old in options:
                _warn(f"the argument {old!r} of {function.__name__}", repr(new))
                options[new] = options.pop(old)
            return function(*args, **options)

        return wrapper  # type: ignore[return-value]

    return decorated


def _warn(old: str, new: str) -> None:
    sentence = f"{old} is {new} now; the old name goes with the next version"
    warnings.warn(sentence, DeprecationWarning, stacklevel=3)
