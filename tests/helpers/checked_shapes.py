"""Check the shapes in signatures at run time, once a call and only where there are any."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args

import jaxtyping

Decorator = Callable[[Any], Any]


def only_with_shapes(jaxtyped: Callable[..., Any]) -> Callable[..., Decorator]:
    """Return what the import hook calls in place of `jaxtyping.jaxtyped`: it decorates what has shapes.

    jaxtyping's own decorator checks the arguments twice, for a better message, and pyright checks what is not a shape:
    both together take a third of the time of many tests. Functions in functions have no shapes, as
    tests/house/test_checked_shapes.py sees.
    """

    def chosen(*, typechecker: Any) -> Decorator:
        def checked(target: Any) -> Any:
            if not any(has_shape(each) for each in target.__annotations__.values()):
                return target
            checking = typechecker(target)

            @functools.wraps(target)
            def called(*args: Any, **kwargs: Any) -> Any:
                if jaxtyping.config.jaxtyping_disable:
                    return target(*args, **kwargs)
                with jaxtyped("context"):
                    return checking(*args, **kwargs)

            return called

        def decorate(target: Any) -> Any:
            if not inspect.isclass(target):
                return checked(target)
            if is_dataclass(target) and "__init__" in vars(target):
                target.__init__ = checked(target.__init__)
            return target

        return decorate

    return chosen


def has_shape(annotation: Any) -> bool:
    """Return whether an annotation has the shape of an array in it."""
    if inspect.isclass(annotation):
        return issubclass(annotation, jaxtyping.AbstractArray)
    return "Tensor" in annotation if isinstance(annotation, str) else any(map(has_shape, get_args(annotation)))
