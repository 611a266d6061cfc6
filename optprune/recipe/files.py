"""Recipes by name and from files, whatever is wrong with them being one sentence."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from optprune.errors import InputError
from optprune.recipe.recipe import Recipe
from optprune.system.files import read_yaml
from optprune.system.wording import shown


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
    return Recipe(fields, overrides or {})


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; InputError, in one sentence, for the first field that is wrong."""
    return Recipe(fields)


def _shipped() -> Any:
    return resources.files("optprune.recipe") / "shipped"
