"""The texts that `optprune recipes` prints: stored beside this file, because the recipes take seconds to import."""

import json
import textwrap
from pathlib import Path

STORED = Path(__file__).with_name("printed_recipes.json")
"""the lines of every text, written by `python -m benchmarks.readme`"""
LIST, FIELDS = "the list", "the fields"
"""the names of the texts that are not of one recipe"""
LINE = 110
"""the largest number of characters in a line of the list"""
LEGEND = """\
time   how long pruning takes, in units of its two calibration passes, on SmolLM2-135M with 8192 tokens; smaller with
       more tokens, and - where it was not measured
loads  which transformers call loads the pruned folder:
  stock  AutoModelForCausalLM.from_pretrained(DIR)
  code   the same call with trust_remote_code=True, which runs the code in the folder; optprune.load_model(DIR)
         loads the folder without it; fasp with --units mlp is stock, and so is depth with
         --set allocation.parts=layers"""


def stored_text(name: str) -> str:
    """Return the stored text of the list, of the fields or of a shipped recipe."""
    return "\n".join(json.loads(STORED.read_text(encoding="utf-8"))[name])


def made_texts() -> dict[str, str]:
    """Return all texts by name, made from the recipes."""
    from optprune.recipe import recipe_names

    return {LIST: _list(), FIELDS: _fields(), **{name: recipe_text(name) for name in recipe_names()}}


def store_texts() -> None:
    """Store all texts, made from the recipes."""
    lines = {name: text.split("\n") for name, text in made_texts().items()}
    STORED.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def recipe_text(name_or_path: str) -> str:
    """Return a recipe as YAML, with its efforts."""
    import yaml

    from optprune.recipe import load_recipe
    from optprune.recipe.recipe import efforts_of

    efforts = efforts_of(name_or_path)
    more = yaml.safe_dump({"efforts": efforts}, sort_keys=False) if efforts else ""
    return load_recipe(name_or_path).to_yaml() + more


def _fields() -> str:
    from optprune.recipe.reference import recipe_fields

    lines = list[str]()
    for field in recipe_fields():
        default = f" [default: {field.default}]" if field.default else ""
        lines.append(f"{field.path}: {field.kind}{default}")
        lines.append(textwrap.fill(field.meaning, 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _list() -> str:
    from optprune.recipe.reference import COSTS, KINDS, loads_stock

    groups = {kind.title: kind.recipes() for kind in KINDS}
    width = max(len(recipe.name) for recipes in groups.values() for recipe in recipes)
    lines = [f"  {'recipe':<{width}}  {'time':>5}  loads  what it does", ""]
    for title, recipes in groups.items():
        lines.append(f"{title}\n")
        for recipe in recipes:
            cost = f"{COSTS[recipe.name]:.3g}x" if recipe.name in COSTS else "-"
            loads = "stock" if loads_stock(recipe) else "code"
            head = f"  {recipe.name:<{width}}  {cost:>5}  {loads:<5}  "
            lines.append(textwrap.fill(recipe.summary, LINE, initial_indent=head, subsequent_indent=" " * len(head)))
        lines.append("")
    return "\n".join([*lines, LEGEND])
