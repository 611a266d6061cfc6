"""README.md and docs/: their Python runs, their commands exist, and their tables are what rows and recipes say."""

import copy
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

import optprune
from benchmarks.readme import FIELDS, PAGES, RECIPES, put, tables
from benchmarks.recipe_tables import LOSS_AWARE, UNITS, WEIGHTS
from optprune.cli.app import app
from optprune.models import LoadedModel
from optprune.recipe import Recipe, load_recipe, recipe_names
from optprune.recipe.fields import spellings
from tests.helpers.pages import BLOCKS, RECIPE_FILES, ROOT, TEXTS

FIRST_BLOCKS = 2
"""what the pages prune of the demo model, for which `notebooks/quickstart.ipynb` runs the whole"""
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
OPTIONS = {
    name: {"--help", *(text for option in command.params for text in option.opts)} for name, command in COMMANDS.items()
}
LINES = [
    (page, line.split("#")[0].split("...")[0].strip())
    for page, text in TEXTS.items()
    for line in text.splitlines()
    if re.match(r"    (optprune|make|pip) ", line)
] + [
    (page, " ".join(code.split()))
    for page, text in TEXTS.items()
    for code in re.findall(r"`((?:optprune|make|python -m benchmarks\.)\b[^`]*)`", text)
    if re.match(r"optprune [a-z]|make [a-z]|python -m", code)
]


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    return optprune.load_model("demo")


@pytest.fixture(scope="session")
def first_blocks(demo: LoadedModel) -> LoadedModel:
    """The demo model with its first blocks alone."""
    loaded, layers = copy.copy(demo), demo.model.model.layers
    demo.model.model.layers = layers[:FIRST_BLOCKS]
    object.__setattr__(loaded, "model", copy.deepcopy(demo.model))
    demo.model.model.layers = layers
    loaded.model.config.num_hidden_layers = FIRST_BLOCKS
    return loaded


def run_page(page: str, demo: LoadedModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python of a page in a folder, where `load_model("demo")` gives a copy of a model."""

    def load_model(name: str) -> LoadedModel:
        assert name == "demo"
        loaded = copy.copy(demo)
        object.__setattr__(loaded, "model", copy.deepcopy(demo.model))
        return loaded

    monkeypatch.setattr(optprune, "load_model", load_model, raising=False)
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"__name__": page}
    for number, block in enumerate(BLOCKS[page]):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.e2e
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(
    page: str,
    first_blocks: LoadedModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_page(page, first_blocks, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_python_of_the_readme_runs_on_the_whole_model(
    demo: LoadedModel, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page("README.md", demo, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, texts in RECIPE_FILES.items() for text in texts])
def test_a_recipe_file_in_a_page_is_one(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert load_recipe(str(file)) == Recipe(load_recipe(str(file)).to_dict())


@pytest.mark.parametrize(
    ("sign", "most"), [("LayerContext) ->", 20), ("(NormPenalty)", 15), ("optprune.layer_loss(loaded", 20)]
)
def test_an_objective_a_penalty_and_a_layer_are_short(sign: str, most: int) -> None:
    shown = [block for blocks in BLOCKS.values() for block in blocks if sign in block]
    assert shown
    assert all(len([line for line in block.splitlines() if line.strip()]) <= most for block in shown)


@pytest.mark.parametrize("base", ["LinkedUnits", "Propagation"])
def test_a_kind_of_units_and_a_policy_are_one_class(base: str) -> None:
    classes = [
        found
        for blocks in BLOCKS.values()
        for block in blocks
        if f"({base})" in block
        for found in re.findall(r"^class .*$|^def .*$", block, re.MULTILINE)
    ]
    assert len(classes) == 1 and classes[0].endswith(f"({base}):")


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: str(value)[:60])
def test_what_a_shell_line_names_exists(page: str, line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)
    elif program == "python":
        assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file()
    elif program == "optprune":
        command, *rest = words
        assert {word for word in rest if word.startswith("--")} <= OPTIONS[command]
        given = dict(pairwise(rest))
        assert given.get("--recipe", "fasp") in recipe_names()
        if command == "recipes" and rest:
            assert rest[0] in (*recipe_names(), "--fields")


def test_every_option_and_recipe_field_in_a_text_exists() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    known = (
        set().union(*OPTIONS.values())
        | set(re.findall(r'"(--[a-z-]+)"', scripts))
        | {"--no-deps", "--strict", "--nproc-per-node"}
    )
    for page, text in TEXTS.items():
        plain = " ".join(text.split())
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", plain)) - known, page
        assert not set(re.findall(r"--set ([a-z_.]+)=", plain)) - set(spellings()), page


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in (*PAGES, *RECIPES, FIELDS) for number in range(len(tables(page)))]
)
def test_a_table_is_what_the_rows_and_the_recipes_say(page: str, number: int) -> None:
    # A failure is mended by `python -m benchmarks.readme`, once the sentences beside the table are true too.
    assert put(TEXTS[page], [tables(page)[number]]) == TEXTS[page]


def test_every_recipe_is_in_one_table() -> None:
    for name in recipe_names():
        assert sum(kind.holds(load_recipe(name)) for kind in (LOSS_AWARE, WEIGHTS, UNITS)) == 1


def test_the_readme_stays_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 130


def test_the_tower_is_drawn_as_the_contract_has_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = [re.findall(r"[a-z]+", floor) for floor in contracts[0]["layers"]]
    drawn = re.findall(r"(?:^    [a-z ]+\n)+", TEXTS["docs/explanation/design.md"], re.MULTILINE)[0]
    assert [line.split() for line in drawn.splitlines()] == floors
