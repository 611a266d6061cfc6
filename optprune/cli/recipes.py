"""optprune recipes: the list, one as YAML, or what may be set."""

import textwrap
from typing import Annotated

import typer


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print as YAML.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="Tell every field that a recipe has.")] = False,
) -> None:
    """List the recipes, print one as YAML, or tell the fields that --set and a recipe file may set."""
    from optprune.errors import InputError
    from optprune.recipe import load_recipe, recipe_names
    from optprune.recipe.fields import recipe_fields

    if name is not None and fields:
        raise InputError("--fields tells what every recipe has: leave out the name of one")
    if fields:
        for field in recipe_fields():
            default = f" [default: {field.default}]" if field.default else ""
            also = f" (also: {field.flat})" if field.flat else ""
            typer.echo(f"{field.path}{also}: {field.kind}{default}")
            typer.echo(textwrap.fill(field.meaning, 100, initial_indent="    ", subsequent_indent="    "))
        return
    if name is not None:
        typer.echo(load_recipe(name).to_yaml(), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names))
    for each in names:
        typer.echo(f"{each:<{width}}  {load_recipe(each).summary}")
