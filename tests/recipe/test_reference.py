"""The overview of the recipes: each is there once, its cost is what was measured, and what loads it is true."""

from statistics import mean

import pytest

from benchmarks.models import read
from benchmarks.studies import digest
from optprune.cli import main
from optprune.models import is_stock
from optprune.pruning import prune
from optprune.recipe import load_recipe, recipe_names
from optprune.recipe.reference import COSTS, KINDS, loads_stock
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import tiny_llama


def test_every_recipe_is_in_one_group() -> None:
    assert sorted(recipe.name for kind in KINDS for recipe in kind.recipes()) == recipe_names()


def test_costs_are_those_of_the_rows() -> None:
    measured = {}
    for name in recipe_names():
        rows = [row for row in read() if row["digest"] == digest(name, {}, 8192) and row["tokens"] == 8192]
        ratios = [row["run / floor"] for row in rows if row["model"].startswith("SmolLM2") and row["run / floor"]]
        if ratios:
            measured[name] = float(f"{mean(ratios):.2g}")
    assert measured == COSTS


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fasp", {}),
        ("fasp", {"units": "mlp"}),
        ("osscar", {}),
        ("structured_best", {"allocation.least": 0.2}),
        ("structured_uniform_best", {}),
        ("sparse_best", {}),
        ("depth", {}),
        ("depth", {"allocation.parts": "layers", "sparsity": 0.5}),
    ],
)
def test_what_is_said_to_load_does(name: str, settings: dict) -> None:
    narrows = bool(load_recipe(name, settings).units.kinds)
    model, recipe = (
        tiny_llama(seed=1),
        load_recipe(name, {"allocation.multiple": 1, **settings} if narrows else settings),
    )
    prune(model, batches(), recipe)
    assert is_stock(model.config) == loads_stock(recipe)


def test_the_list_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    places = [
        told.index(text) for text in ("whole units:", "  fasp ", "single weights:", "  wanda ", "depth:", "  depth ")
    ]
    assert places == sorted(places)
    for name, cost, loads in (
        ("fasp", "1.3x", "code"),
        ("structured_uniform_best", "5.8x", "stock"),
        ("depth", "-", "code"),
    ):
        [line] = [line for line in told.splitlines() if line.startswith(f"  {name} ")]
        assert line.split()[1:3] == [cost, loads]
    assert max(map(len, told.splitlines())) <= 120
