"""Generated parts of docs/reference: recipes, recipe fields, unit kinds, and the options of every command.

`python -m benchmarks.readme` writes them into the pages, and tests/house/test_docs.py checks that they are current.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer

from benchmarks.common import markdown
from optprune import Recipe, load_recipe
from optprune.cli.app import app
from optprune.models import UNITS
from optprune.recipe import recipe_names
from optprune.recipe.reference import recipe_fields


@dataclass(frozen=True)
class Kind:
    """Selection of the recipes of one table; every shipped recipe is in one of them."""

    title: str
    """the title of the first column"""
    holds: Callable[[Recipe], bool]


LOSS_AWARE = Kind("loss-aware recipe", lambda recipe: recipe.metric is not None)
WEIGHTS = Kind("recipe for weights", lambda recipe: not LOSS_AWARE.holds(recipe) and recipe.units.name == "weights")
UNIT_RECIPES = Kind("recipe for units", lambda recipe: not LOSS_AWARE.holds(recipe) and recipe.units.name != "weights")
KINDS = (UNIT_RECIPES, WEIGHTS, LOSS_AWARE)


def recipe_table(kind: Kind) -> str:
    """Return the table of the recipes of a kind, with what each does and its source."""
    rows = [
        {kind.title: f"`{recipe.name}`", "what it does": recipe.summary, "source": recipe.source}
        for recipe in map(load_recipe, recipe_names())
        if kind.holds(recipe)
    ]
    return markdown(rows).rstrip("\n")


def field_table() -> str:
    """Return the table of all fields of a recipe."""
    rows = [
        {
            "field": f"`{field.path}`",
            "value": field.kind,
            "default": f"`{field.default}`" if field.default else "",
            "meaning": field.meaning,
        }
        for field in recipe_fields()
    ]
    return markdown(rows).rstrip("\n")


def unit_table() -> str:
    """Return the table of the unit kinds that a recipe can name."""
    rows = [
        {
            "`units`": f"`{name}`",
            "class": f"`{type(units).__name__}`",
            "narrowed fields of a block": ", ".join(f"`{kind.field}`" for kind in units.kinds),
            "objective without one of your own": f"`{units.objective}`",
        }
        for name, units in UNITS.items()
    ]
    return markdown(rows).rstrip("\n")


def command_page() -> str:
    """Return the page of the command line, from the tables that typer made of the commands."""
    parts = [
        "# Command line",
        "`python -m benchmarks.readme` writes this page from the definitions of the commands, which `optprune COMMAND "
        "--help` prints too. [The guides](../index.md) show the commands at work, and the [glossary](glossary.md) "
        "explains the words.",
    ]
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
    parts += [part for name, command in commands.items() for part in _command(name, command)]
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    """Yield the section of a command: its help, then its arguments and options, panel by panel."""
    yield f"## {name}"
    yield " ".join((command.help or command.short_help).split())
    panels: dict[str, list[dict[str, str]]] = {}
    for option in command.params:
        if not option.hidden:
            panels.setdefault(option.rich_help_panel or "", []).append(_row(option))
    for panel, rows in panels.items():
        if panel:
            yield f"**{panel}**"
        yield markdown(rows).rstrip("\n")


def _row(option: Any) -> dict[str, str]:
    positional = not option.opts[0].startswith("-")
    names = [option.metavar or option.name.upper()] if positional else [*option.opts, *option.secondary_opts]
    flag, default = getattr(option, "is_flag", False), option.default
    value = "" if flag or positional else option.metavar or option.type_descriptor.annotation.__name__
    shown = "required" if option.required else "" if flag or default in (None, "") else f"`{default}`"
    return {
        "option": ", ".join(f"`{word}`" for word in names) + (" (repeatable)" if option.multiple else ""),
        "value": f"`{value}`" if value else "",
        "default": shown,
        "meaning": " ".join((option.help or "").split()),
    }
