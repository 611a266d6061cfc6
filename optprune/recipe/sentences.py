"""Models of pydantic whose first mistake is one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ValidationError

from optprune.errors import InputError
from optprune.system.wording import one_line, shown


class _Making(type(BaseModel)):
    # A type checker would take this for the signature of every model.
    if not TYPE_CHECKING:

        def __call__(cls, *given: Any, **fields: Any) -> Any:
            with _in_one_sentence(cls):
                return super().__call__(*given, **fields)


class OneSentence(BaseModel, metaclass=_Making):
    """A model whose first wrong field is an InputError of one sentence, in place of pydantic's ValidationError."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        with _in_one_sentence(cls):
            return super().model_validate(obj, **options)


@contextmanager
def _in_one_sentence(model: type[BaseModel]) -> Iterator[None]:
    name = model.__name__.lower()
    try:
        yield
    except RecursionError as error:
        raise InputError(f"the {name} is nested too deeply to be read: write it flatter") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = one_line(".".join(str(part) for part in first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        if not key:
            raise InputError(f"the {name} contradicts itself: {reason}") from error
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise InputError(f"a {name} has no field {key!r}: it has {known}") from error
        raise InputError(f"the {name} field {key!r} cannot be {shown(first['input'])}: {one_line(reason)}") from error
