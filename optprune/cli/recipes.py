"""optprune recipes: list the recipes, print one as YAML, or list the recipe fields."""

from typing import Annotated

import typer

from optprune.cli.choices import RECIPES, check_choices
from optprune.cli.outputs import echo
from optprune.cli.printed_recipes import FIELDS, LIST, recipe_text, stored_text
from optprune.errors import InputError


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print as YAML.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field of a recipe.")] = False,
) -> None:
    """List the recipes by kind, print one as YAML, or list the fields that --set and a file may set."""
    if name is not None and fields:
        raise InputError("--fields lists the fields of all recipes: leave out the name of a recipe")
    check_choices(name)
    if name is not None and name not in RECIPES:
        echo(recipe_text(name))
    else:
        echo(stored_text(name or (FIELDS if fields else LIST)))
