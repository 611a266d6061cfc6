"""Shapes that are checked at run time, without a check of closures that costs more than what they do."""

from collections.abc import Callable
from typing import Any

Decorator = Callable[[Any], Any]


def but_closures(jaxtyped: Callable[..., Decorator]) -> Callable[..., Decorator]:
    """In place of `jaxtyping.jaxtyped`, which the import hook calls: what it decorates but functions in functions.

    Those are made anew at each call, and the type checker would be too: milliseconds, a third of the time of many
    tests. They have no shapes in their signatures, as tests/house/test_checked_shapes.py sees.
    """

    def chosen(*, typechecker: Any) -> Decorator:
        def decorate(target: Any) -> Any:
            within = "<locals>" in getattr(target, "__qualname__", "")
            return target if within else jaxtyped(target, typechecker=typechecker)

        return decorate

    return chosen
