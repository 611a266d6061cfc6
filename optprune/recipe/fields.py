"""The fields of a recipe in words, from the models themselves: for `optprune recipes --fields` and docs/."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from optprune.calibration import POLICIES
from optprune.models import UNITS, Weights
from optprune.objectives import OBJECTIVES
from optprune.patterns import ANYWHERE
from optprune.recipe.aliases import ALIASES
from optprune.recipe.groups import GROUPS
from optprune.recipe.names import AUTO, NONE
from optprune.recipe.recipe import Recipe

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
NAMED = {
    "objective": f"null, {', '.join(OBJECTIVES)} or a function",
    "solver": "null, a solver or a list of solvers",
    "units": f"{', '.join(UNITS)} or {{{Weights.name}: PATTERN}}",
    "propagation": f"{', '.join(POLICIES)} or {AUTO}",
    "allocation.blocks": "a list with what each block keeps",
}
"""what the fields hold whose values are names"""
PATTERN = "the pattern of single weights: over each matrix, the same count in every row, or N:M such as 2:4"
BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


@dataclass(frozen=True)
class RecipeField:
    """What there is to know of a field before it is set."""

    path: str
    """its name, after those of the groups that it is in"""
    kind: str
    """what its value may be"""
    default: str
    """its value where it is not set; empty where there is none: the group is there once this is set"""
    meaning: str
    flat: str
    """its other name, if it has one"""


def recipe_fields() -> list[RecipeField]:
    """All fields of a recipe; those of a group follow it."""
    defaults, found = Recipe().to_dict(), list[RecipeField]()
    for name, info in Recipe.model_fields.items():
        if name in GROUPS:
            found += _group(name, info)
        else:
            found.append(_field(name, info, NAMED.get(name) or _kind(info), _in_words(defaults[name])))
        if name == "units":
            path = ALIASES["pattern"]
            found.append(RecipeField(path, "unstructured, rows or N:M", ANYWHERE.name, PATTERN, "pattern"))
    return found


def spellings() -> list[str]:
    """Every name under which something of a recipe can be set."""
    switches = [f"{path}.{choice.switch}" for path, choice in GROUPS.items()]
    return list(dict.fromkeys([*(field.path for field in recipe_fields()), *switches, *ALIASES]))


def _group(path: str, parent: FieldInfo) -> Iterator[RecipeField]:
    """A group, which its switch alone may stand for, and its other fields."""
    choice = GROUPS[path]
    kinds = list(choice.kinds) or [f"{{{choice.switch}: ...}}"]
    optional = [] if choice.default else [NONE]
    stands_for = f"{path}.{choice.switch}" if choice.kinds else ""
    yield _field(path, parent, _either(optional + kinds), choice.default or NONE, stands_for)
    for name in choice.names:
        owners, inner = choice.owners(name), f"{path}.{name}"
        info = owners[0].model_fields[name]
        if inner in GROUPS:
            yield from _group(inner, info)
        elif name != choice.switch or not choice.kinds:
            default = "" if info.is_required() else _in_words(info.default)
            every = len(owners) == len(choice.models)
            where = "" if every else f"of {_either([owner.model_fields[choice.switch].default for owner in owners])}: "
            yield _field(inner, info, NAMED.get(inner) or _kind(info), default, inner, where)


def _field(path: str, info: FieldInfo, kind: str, default: str, stands_for: str = "", where: str = "") -> RecipeField:
    flat = [name for name, target in ALIASES.items() if target in (path, stands_for)]
    meaning = where + " ".join((info.description or "").split())
    return RecipeField(path, kind, default, meaning, ", ".join(flat))


def _kind(info: FieldInfo) -> str:
    found = [(word, getattr(bound, sign, None)) for bound in info.metadata for sign, word in BOUNDS.items()]
    limits = [f"{word} {limit}" for word, limit in found if limit is not None]
    return " ".join([_words(info.annotation), ", ".join(limits)]).strip()


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either(list(inner))
    if origin is UnionType:
        return _either([WORDS[NoneType], *(_words(kind) for kind in inner if kind is not NoneType)])
    return "numbers" if origin is tuple else WORDS[annotation]


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
