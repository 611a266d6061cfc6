"""The tables of recipes in docs/, in the recipes' own words: `python -m benchmarks.readme` puts them there."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common import markdown
from optprune import Recipe, load_recipe
from optprune.recipe import recipe_names
from optprune.recipe.reference import recipe_fields


@dataclass(frozen=True)
class Kind:
    """The recipes of one table; every shipped recipe is in one of them."""

    title: str
    """the first column's"""
    holds: Callable[[Recipe], bool]


LOSS_AWARE = Kind("loss-aware recipe", lambda recipe: recipe.metric is not None)
WEIGHTS = Kind("recipe for weights", lambda recipe: not LOSS_AWARE.holds(recipe) and recipe.units.name == "weights")
UNITS = Kind("recipe for units", lambda recipe: not LOSS_AWARE.holds(recipe) and recipe.units.name != "weights")


def recipe_table(kind: Kind) -> str:
    """What every recipe of a kind does and where it comes from."""
    rows = [
        {kind.title: f"`{recipe.name}`", "what it does": recipe.summary, "source": recipe.source}
        for recipe in map(load_recipe, recipe_names())
        if kind.holds(recipe)
    ]
    return markdown(rows).rstrip("\n")


def field_table() -> str:
    """What may be set of a recipe, and what that does."""
    rows = [
        {
            "field": f"`{field.path}`",
            "value": field.kind,
            "default": f"`{field.default}`" if field.default else "",
            "what it says": field.meaning,
        }
        for field in recipe_fields()
    ]
    return markdown(rows).rstrip("\n")
