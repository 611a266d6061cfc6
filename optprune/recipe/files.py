"""Recipes by name and from files, whatever is wrong with them being one sentence."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from optprune.errors import InputError
from optprune.recipe.recipe import Recipe
from optprune.system.files import read_yaml
from optprune.system.wording import one_line, shown

DESCRIBED = ("objective", "solver", "units", "propagation", "allocation", "metric", "refit")
"""the fields whose values a summary may describe"""


def recipe_names() -> list[str]:
    """The recipes that come with optprune."""
    return sorted(file.name.removesuffix(".yaml") for file in _shipped().iterdir() if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its name or from a YAML file, with some fields replaced."""
    if name_or_path in recipe_names():
        text = (_shipped() / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_path).suffix in (".yaml", ".yml"):
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the recipe file {name_or_path} cannot be read: {error}") from error
    else:
        raise InputError(
            f"the recipe {shown(name_or_path)} is not known: use one of {', '.join(recipe_names())}, or a .yaml file"
        )
    fields = read_yaml(text, f"the recipe file {name_or_path}")
    if not isinstance(fields, dict):
        raise InputError(f"the recipe file {name_or_path} must hold fields and values, such as 'sparsity: 0.2'")
    return _with_told_changes(Recipe(fields, overrides or {}), fields, overrides or {})


def _with_told_changes(recipe: Recipe, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """The recipe, whose summary names what was changed of what it describes."""
    if not recipe.summary or "summary" in overrides:
        return recipe
    try:
        before = Recipe(fields).to_dict()
    except InputError:  # complete only with what overrides it
        return recipe
    now = recipe.to_dict()
    changed = [f"{name} {_in_short(now[name])}" for name in DESCRIBED if now[name] != before[name]]
    if not changed:
        return recipe
    return recipe.model_copy(update={"summary": f"{recipe.summary} (changed here: {', '.join(changed)})"})


def _in_short(value: Any) -> str:
    """A field's value, or the kind of its group."""
    kind = value.get("kind", value) if isinstance(value, dict) else value
    return kind if isinstance(kind, str) else one_line(json.dumps(kind), 60)


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; InputError, in one sentence, for the first field that is wrong."""
    return Recipe(fields)


def _shipped() -> Any:
    return resources.files("optprune.recipe") / "shipped"
