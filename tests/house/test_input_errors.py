"""One mistake, one error: a bad value is an InputError, which is a ValueError, wherever it is given."""

import ast
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest

import optprune
from optprune.errors import InputError, OptpruneError
from optprune.penalties import L1
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import Chain, Fista, FistaPath, Magnitude, Random, Solver, Spap
from optprune.testing import reference_optimum
from tests.helpers.structured_cases import channels

ROOT = Path(optprune.__file__).parent


def nested(chain: Solver, _: int) -> Chain:
    return Chain((chain,))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Recipe(sparsity=2), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe({"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: load_recipe("fasp", {"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe.model_validate({"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe(dampening=1), "no field 'dampening'.*did you mean damping.*: it has name, "),  # type: ignore[call-arg]
        (
            lambda: Recipe({"refit.recovery": 1}),
            r"field 'refit\.recovery' has no effect without refit\.held_out",
        ),
        (lambda: Recipe(solver={"spap": {"first": -1}}), "'solver' cannot be .*: first of Spap must be"),  # type: ignore[arg-type]
        (lambda: Recipe(units={"weights": "2:x"}), "'units' cannot be '2:x': the pattern '2:x' is not known"),  # type: ignore[arg-type]
        (lambda: Fista(-1.0), "tolerance of Fista must be between"),
        (lambda: Random(-1), "seed of Random must be between"),
        (lambda: FistaPath(ratio=0.5), "ratio of FistaPath must be more than 1"),
        (lambda: Spap(first=10.0, last=1.0), "cannot grow from 10 to 1"),
        (lambda: reduce(nested, range(20), Magnitude()), "a chain of chains is more than"),
        (lambda: L1(-1), "the strength of an l1 penalty"),
        (lambda: reference_optimum(channels(0, "mixed", units=16, keep=8)), "too many to list"),
    ],
)
def test_a_bad_value_is_an_input_error_of_one_sentence(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OptpruneError)
    assert "\n" not in str(caught.value)


def test_nothing_raises_a_bare_value_error_but_to_pydantic() -> None:
    found = []
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # What a validator raises reaches nobody as it is.
        for node in () if "from pydantic import" in text else ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                named = node.exc.func
                if isinstance(named, ast.Name) and named.id == "ValueError":
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"raise InputError in place of ValueError: {found}"


def test_commands_print_by_the_one_function_that_escapes() -> None:
    """`echo` in cli/outputs.py leaves out what a terminal would obey; errors.py does so itself."""
    apart = {"outputs.py", "errors.py", "app.py"}
    files = [file for file in (ROOT / "cli").glob("*.py") if file.name not in apart]
    assert files
    assert [file.name for file in files if "typer.echo" in file.read_text(encoding="utf-8")] == []
