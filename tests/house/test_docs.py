"""README.md and docs/: the Python runs, the commands exist, and generated parts are current."""

import importlib
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

import optprune
from benchmarks.readme import COMMANDS, PAGES, REFERENCE, put, tables
from benchmarks.reference_pages import KINDS, command_page
from optprune.cli.app import app
from optprune.models import ARCHITECTURES, LoadedModel
from optprune.recipe import Recipe, load_recipe, recipe_names
from optprune.recipe.reference import recipe_fields
from tests.helpers.pages import BLOCKS, RECIPE_FILES, ROOT, TEXTS, copied, narrow

NAMES = {field.path for field in recipe_fields()}
EXTEND = "docs/guide/extend.md"
SECTIONS = [re.findall(r"^## (.+)$", TEXTS[EXTEND].partition(block)[0], re.MULTILINE)[-1] for block in BLOCKS[EXTEND]]
"""the headings above the examples of the page about extensions"""
PROGRAM = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
OPTIONS = {
    name: {"--help", *(text for option in command.params for text in option.opts)} for name, command in PROGRAM.items()
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
def small(demo: LoadedModel) -> LoadedModel:
    """A narrow model; `make demo` prunes the real one."""
    return narrow(demo)


def run(code: str, name: str, demo: LoadedModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block by itself in a folder, where "demo" is a copy of a model."""
    honest = optprune.prune_model

    def prune_model(model: Any, *more: Any, **options: Any) -> Any:
        if model == "demo":
            optprune.save_model(copied(demo), model := place / "dense")
        return honest(model, *more, **options)

    monkeypatch.setattr(optprune, "load_model", lambda name: copied(demo), raising=False)
    monkeypatch.setattr(optprune, "prune_model", prune_model, raising=False)
    monkeypatch.chdir(place)
    exec(compile(code, name, "exec"), {"__name__": name})


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page, blocks in BLOCKS.items() if page != EXTEND for number in range(len(blocks))],
)
def test_a_block_of_python_runs_by_itself(
    page: str,
    number: int,
    small: LoadedModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(BLOCKS[page][number], f"{page}, block {number}", small, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("number", range(len(BLOCKS[EXTEND])), ids=SECTIONS)
def test_an_extension_works_from_a_package_of_a_stranger(
    number: int,
    small: LoadedModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / f"stranger{number}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "extension.py").write_text(BLOCKS[EXTEND][number], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optprune, "load_model", lambda name: copied(small), raising=False)
    known = dict(ARCHITECTURES)
    try:
        importlib.import_module(f"stranger{number}.extension")
    finally:
        ARCHITECTURES.clear()
        ARCHITECTURES.update(known)
    assert capsys.readouterr().out.strip()


def test_every_extension_point_has_a_section_with_an_example() -> None:
    assert {name.lower() for name in SECTIONS} >= {
        *("objective", "penalty", "solver", "unit kind", "propagation policy", "allocator", "refinement"),
        *("architecture", "exporter", "recipe"),
    }


@pytest.mark.slow
def test_the_python_of_the_readme_runs_on_the_whole_model(
    demo: LoadedModel, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, block in enumerate(BLOCKS["README.md"]):
        run(block, f"README.md, block {number}", demo, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, texts in RECIPE_FILES.items() for text in texts])
def test_a_recipe_file_in_a_page_is_one(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert load_recipe(str(file)) == Recipe(load_recipe(str(file)).to_dict())


@pytest.mark.parametrize(
    ("sign", "most"), [("LayerContext) ->", 20), ("(NormPenalty)", 30), ("optprune.layer_loss(loaded", 20)]
)
def test_an_objective_a_penalty_and_a_layer_are_short(sign: str, most: int) -> None:
    shown = [block for blocks in BLOCKS.values() for block in blocks if sign in block]
    assert shown
    assert all(len([line for line in block.splitlines() if line.strip()]) <= most for block in shown)


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
        | {"--no-cache", "--no-deps", "--index-url", "--strict"}  # of benchopt, pip and mkdocs
        | {"--nproc-per-node"}  # of torchrun
    )
    for page, text in TEXTS.items():
        plain = " ".join(text.split())
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", plain)) - known, page
        assert not set(re.findall(r"--set ([a-z_.]+)=", plain)) - NAMES, page


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in (*PAGES, *REFERENCE) for number in range(len(tables(page)))]
)
def test_a_generated_table_is_current(page: str, number: int) -> None:
    # If this fails, run `python -m benchmarks.readme` and read the sentences beside the table.
    assert put(TEXTS[page], [tables(page)[number]]) == TEXTS[page]


def test_the_page_of_the_command_line_is_current() -> None:
    # If this fails, run `python -m benchmarks.readme`.
    assert command_page() == TEXTS[COMMANDS]


def test_every_recipe_is_in_one_table() -> None:
    for name in recipe_names():
        assert sum(kind.holds(load_recipe(name)) for kind in KINDS) == 1


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("docs/") and page != "docs/index.md"])
def test_a_page_is_in_the_folder_of_its_kind_and_tells_no_history(page: str) -> None:
    assert page.split("/")[1] in ("guide", "explanation", "reference", "results")
    found = re.findall(r"\b(?:no longer|used to be|was once|since version|formerly)\b", TEXTS[page])
    assert not found, f"{page}: {found}"


def test_the_glossary_has_the_words_of_the_code() -> None:
    terms = {term.lower() for term in re.findall(r"\*\*(.+?)\*\*", TEXTS["docs/reference/glossary.md"])}
    assert terms >= {
        *("block", "layer", "unit", "unit kind", "keep", "remove", "mask", "support", "pattern", "share", "budget"),
        *("allocation", "cost curve", "gram matrix", "moments", "damping", "output metric", "stage", "refinement"),
        *(
            "executor",
            "worker",
            "job",
            "journal",
            "run folder",
            "shard",
            "checkpoint",
            "cache",
            "partial sums",
            "draft",
        ),
        *("certificate", "bound", "gap", "warm start", "restore", "recover", "heal", "teacher"),
    }


def test_the_readme_stays_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 130


def test_the_levels_are_drawn_as_the_contract_has_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = [re.findall(r"[a-z]+", floor) for floor in contracts[0]["layers"]]
    drawn = re.findall(r"(?:^    [a-z ]+\n)+", TEXTS["docs/explanation/design.md"], re.MULTILINE)[0]
    assert [line.split() for line in drawn.splitlines()] == floors
