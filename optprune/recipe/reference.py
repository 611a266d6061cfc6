"""Reference of recipes: their fields in words, made from the models, and the list of shipped recipes with costs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from optprune.calibration import POLICIES
from optprune.models import UNITS, Weights
from optprune.objectives import OBJECTIVES
from optprune.patterns import ANYWHERE
from optprune.recipe.groups import GROUPS, DepthSearch, UniformShares
from optprune.recipe.names import NONE, write_solver
from optprune.recipe.recipe import Recipe, load_recipe, recipe_names
from optprune.solvers import Solver
from optprune.system.wording import either

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
NAMED = {
    "objective": f"null, {', '.join(OBJECTIVES)} or a function",
    "solver": "null, a solver or a list of solvers",
    "units": f"{', '.join(UNITS)} or {{{Weights.name}: PATTERN}}",
    "propagation": either(tuple(POLICIES)),
    "bits.solver": "a solver or a list of solvers",
    "allocation.blocks": "a list with an entry for each block",
}
"""values of the fields that hold names or lists"""
PATTERN = "pattern of single weights: over each matrix, the same count in every row, or N:M such as 2:4"
BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


@dataclass(frozen=True)
class RecipeField:
    """Description of a field."""

    path: str
    """the name, after the names of the groups around it"""
    kind: str
    """the values that it takes"""
    default: str
    """the value where it is not set; empty where setting it switches its group on"""
    meaning: str


def recipe_fields() -> list[RecipeField]:
    """Return all fields of a recipe; those of a group follow it."""
    defaults, found = Recipe().to_dict(), list[RecipeField]()
    for name, info in Recipe.model_fields.items():
        if name in GROUPS:
            found += _group(name, info)
        else:
            found.append(_field(name, info, _in_words(defaults[name])))
        if name == "units":
            found.append(RecipeField("units.weights", "unstructured, rows or N:M", ANYWHERE.name, PATTERN))
    return found


def spellings() -> list[str]:
    """Return every path under which a setting of a recipe can be given."""
    switches = [f"{path}.{choice.switch}" for path, choice in GROUPS.items()]
    return list(dict.fromkeys([*(field.path for field in recipe_fields()), *switches]))


def _group(path: str, parent: FieldInfo) -> Iterator[RecipeField]:
    """Yield the description of a group and of its fields, without a switch that the group's own value sets."""
    choice = GROUPS[path]
    yield RecipeField(path, choice.values, choice.default or NONE, _meaning(parent))
    for name in choice.names:
        owners, inner = choice.owners(name), f"{path}.{name}"
        info = owners[0].model_fields[name]
        if inner in GROUPS:
            yield from _group(inner, info)
        elif name != choice.switch or not choice.kinds:
            every = len(owners) == len(choice.models)
            prefix = "" if every else f"of {either([owner.model_fields[choice.switch].default for owner in owners])}: "
            yield _field(
                inner,
                info,
                "" if info.is_required() else _in_words(info.get_default(call_default_factory=True)),
                prefix,
            )


def _field(path: str, info: FieldInfo, default: str, prefix: str = "") -> RecipeField:
    return RecipeField(path, NAMED.get(path) or _kind(info), default, prefix + _meaning(info))


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _kind(info: FieldInfo) -> str:
    found = [(word, getattr(bound, sign, None)) for bound in info.metadata for sign, word in BOUNDS.items()]
    limits = [f"{word} {limit}" for word, limit in found if limit is not None]
    return " ".join([_words(info.annotation), ", ".join(limits)]).strip()


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return either(list(inner))
    if origin is UnionType:
        return either([WORDS[NoneType], *(_words(kind) for kind in inner if kind is not NoneType)])
    return "numbers" if origin is tuple else WORDS[annotation]


def _in_words(value: Any) -> str:
    if isinstance(value, Solver):
        value = write_solver(value)
    return value if isinstance(value, str) else json.dumps(value)


COSTS = {
    "alps": 5.0,
    "alps_plus": 9.1,
    "fasp": 1.3,
    "fistapruner_plus": 18.0,
    "flap": 1.1,
    "magnitude": 1.4,
    "osscar": 1.9,
    "spap": 3.1,
    "sparse_best": 12.0,
    "sparsegpt": 2.1,
    "structured_best": 11.0,
    "structured_uniform_best": 5.8,
    "spap_plus": 3.6,
    "wanda": 1.4,
}
"""time of a run over the time of its two calibration passes, mean of the seeds, where it was measured: on SmolLM2-135M
with 8192 calibration tokens, by `python -m benchmarks.models`"""


@dataclass(frozen=True)
class Kind:
    """Shipped recipes that prune the same kind of unit."""

    title: str
    holds: Callable[[Recipe], bool]

    def recipes(self) -> list[Recipe]:
        """Return the recipes, those of known cost first, from the cheapest."""
        found = [recipe for recipe in map(load_recipe, recipe_names()) if self.holds(recipe)]
        return sorted(found, key=lambda recipe: COSTS.get(recipe.name, float("inf")))


KINDS = (
    Kind(
        "whole units: the pruned model is smaller, and faster in every runtime that loads it",
        lambda recipe: bool(recipe.units.kinds) and recipe.vocabulary is None,
    ),
    Kind("vocabulary: rows of the embedding and the head", lambda recipe: recipe.vocabulary is not None),
    Kind(
        "single weights: zeros in a folder of the same size, faster where a runtime has a kernel for them",
        lambda recipe: recipe.units.family is not None,
    ),
    Kind("experts: whole ones, with their rows of the router", lambda recipe: recipe.units.experts),
    Kind("depth: whole attention and MLP sub-blocks", lambda recipe: recipe.units.sub_blocks),
)
"""kinds of recipes; every shipped recipe is in one"""


def loads_stock(recipe: Recipe) -> bool:
    """Return whether stock transformers loads every model pruned by a recipe, without code of optprune."""
    if recipe.units.family is not None:
        return True
    if isinstance(recipe.allocation, DepthSearch):
        return recipe.allocation.parts == "layers"
    return isinstance(recipe.allocation, UniformShares) and recipe.units.name in ("mlp", "experts")
