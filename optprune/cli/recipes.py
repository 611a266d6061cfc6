"""optprune recipes: the list, or one as YAML."""

from typing import Annotated

import typer


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print as YAML.")] = None,
) -> None:
    """List the recipes, or print one as YAML."""
    from optprune.recipe import load_recipe, recipe_names

    if name is not None:
        typer.echo(load_recipe(name).to_yaml(), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names))
    for each in names:
        typer.echo(f"{each:<{width}}  {load_recipe(each).summary}")
