"""Shapes that are checked at run time, without checks that find nothing and cost more than what they check."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import jaxtyping
from beartype import beartype

Decorator = Callable[[Any], Any]
SHAPE = re.compile(r"jaxtyping|\b(Float|Int|Integer|Bool|Shaped|Num)\w*\[")
"""in the annotation of a parameter or of what is returned"""


def where_there_are_shapes(jaxtyped: Callable[..., Decorator]) -> Callable[..., Decorator]:
    """In place of `jaxtyping.jaxtyped`, which the import hook calls: what that does, where there is a shape to check.

    The types of a function without shapes are checked by beartype alone: jaxtyping binds the arguments of each call and
    checks them twice. Functions in functions are made anew at each call, and their checker would be too: milliseconds
    each time. They have no shapes, as tests/house/test_checked_shapes.py sees, and are left as they are.
    """

    def chosen(*, typechecker: Any) -> Decorator:
        def decorate(target: Any) -> Any:
            if inspect.isclass(target):
                if dataclasses.is_dataclass(target) and not _has_shapes(target.__init__):
                    target.__init__ = _typed(target.__init__)
                    return target
                return jaxtyped(target, typechecker=typechecker)
            if inspect.isfunction(target) and "<locals>" in target.__qualname__:
                return target
            if inspect.isfunction(target) and not _has_shapes(target):
                return _typed(target)
            return jaxtyped(target, typechecker=typechecker)

        return decorate

    return chosen


def _has_shapes(function: Any) -> bool:
    signature = inspect.signature(function)
    notes = [signature.return_annotation, *(each.annotation for each in signature.parameters.values())]
    return any(SHAPE.search(note if isinstance(note, str) else repr(note)) for note in notes)


def _typed(function: Any) -> Any:
    """A function whose types are checked, where a test does not want to be as users run."""
    checked = beartype(function)

    @wraps(function)
    def typed(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return typed
