"""The names that options take: those of the tables, refused at once where they are mistyped, and told in the help."""

import re
import subprocess
import sys

import pytest

from optprune.calibration import POLICIES
from optprune.calibration.expert_use import MEASURES
from optprune.cli import choices, main
from optprune.models import DTYPES, UNITS
from optprune.models.units import LEAST_MULTIPLE, MULTIPLE, WIDE, WIDE_MULTIPLE
from optprune.program import RUNTIMES
from optprune.pruning.run import STATES
from optprune.recipe import load_recipe, recipe_names
from optprune.recipe.groups import GROUPS
from optprune.recipe.names import NONE
from optprune.recipe.recipe import EFFORTS
from optprune.system.wording import either
from optprune.texts import SEQUENCES


def test_the_copies_are_the_tables() -> None:
    assert tuple(recipe_names()) == choices.RECIPES
    assert tuple(UNITS) == choices.UNITS
    assert EFFORTS == choices.EFFORTS
    assert tuple(POLICIES) == choices.POLICIES
    assert tuple(RUNTIMES) == choices.RUNTIMES
    assert tuple(STATES) == choices.STATES
    assert (NONE, *GROUPS["bits"].kinds) == choices.BITS
    assert tuple(SEQUENCES) == choices.SEQUENCES
    assert MEASURES == choices.MEASURES
    assert ("auto", *DTYPES) == choices.DTYPES
    small = f"{LEAST_MULTIPLE} or {MULTIPLE // 2} in small heads and MLPs"
    assert f"{MULTIPLE}, and {WIDE_MULTIPLE} for MLPs of {WIDE} units or more; {small}" == choices.MULTIPLES


def test_the_help_tells_names_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--help"]) == 0
    page = capsys.readouterr().out
    # A name may be broken at its hyphen.
    told = " ".join(page.split()).replace("- ", "-")
    for names in (choices.UNITS, choices.POLICIES, choices.RUNTIMES):
        assert either(names) in told
    assert f"the recipe's, {load_recipe('fasp').sparsity} for fasp" in told
    usual = page.split("Advanced options:")[0]
    # An option begins its line; a name of one inside a sentence is no option.
    assert len(re.findall(r"^ +--[a-z]", usual, re.MULTILINE)) <= 24
    advanced = told.split("Advanced options:")[1]
    assert all(name in advanced for name in ("--max-shard-size", "--partial-sums", "--lanes"))


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--recipe", "fassp"], "did you mean fasp?"),
        (["--units", "ml"], "did you mean mlp?"),
        (["--propagation", "inta"], "did you mean intra?"),
        (["--target", "vlm"], "did you mean vllm?"),
        (["--bits", "q4"], "did you mean q4_0?"),
        (["--dtype", "bfloat"], "did you mean bfloat16?"),
        (["--recpie", "fasp"], "--recipe"),
        (["--samples", "few"], "(see optprune prune --help)"),
    ],
)
def test_a_mistyped_name_is_refused(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "model", "--calibration", "text.txt", "--output", "out", *words]) == 2
    assert meant in capsys.readouterr().err


def test_a_refusal_imports_nothing_heavy() -> None:
    program = (
        "import sys; from optprune.cli import main;"
        "main(['prune', 'model', '--calibration', 'text.txt', '--output', 'out', '--recipe', 'fassp']);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
