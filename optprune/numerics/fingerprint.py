"""Content hashes: of frozen dataclasses of tensors and plain data, and of the code of functions and classes."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

LATER = "later"
"""the metadata of a field that was added later: None, as before, gives the fingerprint of an earlier version"""
PART = 1 << 22
"""the number of entries of a tensor that are copied at a time"""


def plain(value: Any) -> Any:
    """Return a number of numpy as the Python number, and every other value as it is."""
    return value.item() if isinstance(value, np.generic) else value


def fingerprint(value: Any) -> str:
    """Return a SHA-256 hex digest of the content of a dataclass, the same on every device."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    value = plain(value)
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        for part in torch.split(value.detach().cpu().reshape(-1), PART):
            # A copy, because a single number counts as contiguous with any stride, and then cannot be viewed as bytes.
            digest.update(part.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value):
        digest.update(type(value).__name__.encode())
        for field in dataclasses.fields(value):
            if not field.compare:
                continue  # derived knowledge, not content
            if field.metadata.get(LATER) and getattr(value, field.name) is None:
                continue
            digest.update(field.name.encode())
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    else:
        raise TypeError(f"a fingerprint is for plain data, not for {type(value).__name__}")


def code_fingerprint(value: Any) -> str:
    """Return a SHA-256 hex digest of the bytecode of a function, or of the class of an object.

    Functions, classes and plain values that the code names are part of it, unless they are of an installed package
    other than its own. Comments and line numbers do not count.
    """
    digest = hashlib.sha256()
    owner = value if isinstance(value, FunctionType | type) else type(value)
    for text in _code_texts(value, _package(owner), set()):
        # A line each, so that (1, 23) differs from (12, 3).
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0]


def _is_own(value: Any, package: str) -> bool:
    """Return whether the code of a value belongs to a package, or to no installed package."""
    found = _package(value)
    if found == package:
        return True
    module = sys.modules.get(found)
    place = getattr(module, "__file__", None) or ""
    installed = (
        found in sys.stdlib_module_names
        or found == "optprune"
        or {"site-packages", "dist-packages"} & {*Path(place).parts}
    )
    return module is not None and not installed


def _code_texts(value: Any, package: str, seen: set[int]) -> Iterator[str]:
    """Yield texts that together determine what the code of a value does, each function and class once."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _code_texts(item, package, seen)
    elif isinstance(value, dict):
        yield from _code_texts(tuple(value.items()), package, seen)
    elif isinstance(value, frozenset | set):
        yield from sorted(map(repr, value))
    elif isinstance(value, staticmethod | classmethod):
        yield from _code_texts(value.__func__, package, seen)
    elif isinstance(value, property):
        yield from _code_texts((value.fget, value.fset), package, seen)
    elif isinstance(value, functools.cached_property):
        yield from _code_texts(value.func, package, seen)
    elif isinstance(value, functools.partial):
        yield from _code_texts((value.func, *value.args, *value.keywords.items()), package, seen)
    elif id(value) not in seen and _is_own(value, package):
        seen.add(id(value))
        yield from _definition_texts(value, package, seen)


def _definition_texts(value: Any, package: str, seen: set[int]) -> Iterator[str]:
    """Yield the texts of a function, a class or an object of a class."""
    if isinstance(value, FunctionType):
        yield from _code_texts((value.__defaults__, *(value.__kwdefaults__ or {}).items()), package, seen)
        yield from _code_texts(tuple(_closure_values(value)), package, seen)
        for code in _nested(value.__code__):
            yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
            yield from _code_texts([item for item in code.co_consts if not isinstance(item, CodeType)], package, seen)
            for name in code.co_names:
                named = value.__globals__.get(name)
                if isinstance(named, ModuleType) and _is_own(named, package):
                    yield from _code_texts([getattr(named, inner, None) for inner in code.co_names], package, seen)
                else:
                    yield from _code_texts(named, package, seen)
    elif isinstance(value, type):
        for cls in value.__mro__:
            for name, member in vars(cls).items() if _is_own(cls, package) else ():
                if name not in ("__doc__", "__module__", "__firstlineno__", "__static_attributes__"):
                    yield name
                    yield from _code_texts(member, package, seen)
    else:
        yield from _code_texts(type(value), package, seen)
        yield from _code_texts(tuple(getattr(value, "__dict__", {}).items()), package, seen)


def _closure_values(function: FunctionType) -> Iterator[Any]:
    """Yield the values in the closure of a function, without variables that are not assigned yet."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
