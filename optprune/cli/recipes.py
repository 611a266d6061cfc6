"""optprune recipes: list the recipes, print one as YAML, or list the recipe fields."""

import textwrap
from typing import Annotated

import typer

from optprune.cli.outputs import echo

LINE = 110
"""the largest number of characters in a line of the list"""
LEGEND = """\
x      the time of a run over that of its two calibration passes, on SmolLM2-135M with 8192 tokens; smaller with more
       tokens, and - where it was not measured
stock  AutoModelForCausalLM.from_pretrained(DIR) loads the folder
code   the same call with trust_remote_code=True loads it, and so does optprune.load_model(DIR), which runs no code
       from the folder; fasp with --units mlp is stock, and so is depth with --set allocation.parts=layers"""


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print as YAML.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field of a recipe.")] = False,
) -> None:
    """List the recipes by kind, print one as YAML, or list the fields that --set and a file may set."""
    import yaml

    from optprune.errors import InputError
    from optprune.recipe import load_recipe
    from optprune.recipe.recipe import efforts_of
    from optprune.recipe.reference import recipe_fields

    if name is not None and fields:
        raise InputError("--fields lists the fields of all recipes: leave out the name of a recipe")
    if fields:
        for field in recipe_fields():
            default = f" [default: {field.default}]" if field.default else ""
            echo(f"{field.path}: {field.kind}{default}")
            echo(textwrap.fill(field.meaning, 100, initial_indent="    ", subsequent_indent="    "))
        return
    if name is not None:
        efforts = efforts_of(name)
        echo(load_recipe(name).to_yaml() + (yaml.safe_dump({"efforts": efforts}, sort_keys=False) if efforts else ""))
        return
    _overview()


def _overview() -> None:
    from optprune.recipe.reference import COSTS, KINDS, loads_stock

    groups = {kind.title: kind.recipes() for kind in KINDS}
    width = max(len(recipe.name) for recipes in groups.values() for recipe in recipes)
    for title, recipes in groups.items():
        echo(f"{title}\n")
        for recipe in recipes:
            cost = f"{COSTS[recipe.name]:.3g}x" if recipe.name in COSTS else "-"
            loads = "stock" if loads_stock(recipe) else "code"
            head = f"  {recipe.name:<{width}}  {cost:>5}  {loads:<5}  "
            echo(textwrap.fill(recipe.summary, LINE, initial_indent=head, subsequent_indent=" " * len(head)))
        echo("")
    echo(LEGEND)
