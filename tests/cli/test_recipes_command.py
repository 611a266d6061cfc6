"""What `optprune recipes` prints is stored as text, so that it needs no model library, and is today's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.printed_recipes import FIELDS, LIST, STORED, made_texts
from optprune.recipe import load_recipe, recipe_names

HEAVY = {"numpy", "optprune.models", "optprune.recipe.recipe", "scipy", "torch", "transformers"}


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--fields"], ["recipes", "structured_best"]], ids=" ".join)
def test_recipes_are_printed_without_the_libraries_of_models(words: list[str]) -> None:
    code = f"import sys; from optprune.cli import main; main({words}); print('\\n', *sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) > 20
    loaded = set(run.stderr.split())
    assert "optprune.cli.recipes" in loaded
    assert loaded & HEAVY == set()


def test_what_is_stored_is_what_the_recipes_and_their_fields_say() -> None:
    # If this fails, run `python -m benchmarks.readme`.
    stored, now = json.loads(STORED.read_text(encoding="utf-8")), made_texts()
    assert sorted(now) == sorted([LIST, FIELDS, *recipe_names()])
    assert {name: "\n".join(lines) for name, lines in stored.items()} == now


def test_a_file_of_ones_own_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nunits: mlp\nsparsity: 0.3\nefforts: {quick: {damping: 0.1}}\n")
    assert main(["recipes", str(file)]) == 0
    told = capsys.readouterr().out
    assert told == load_recipe(str(file)).to_yaml() + "efforts:\n  quick:\n    damping: 0.1\n\n"
