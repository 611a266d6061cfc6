"""What the tests check at run time: the shapes in the signatures of the functions of modules and classes."""

import ast
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from optprune.moments import InputMoments

ROOT = Path(__file__).parents[2] / "optprune"
CHECKED = [
    *(ROOT / f"{name}.py" for name in ("metric", "moments", "patterns")),
    *sorted((ROOT / "problems").rglob("*.py")),
    *sorted((ROOT / "solvers").rglob("*.py")),
]


def test_a_wrong_number_of_dimensions_is_an_error() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        InputMoments.from_samples(torch.zeros(3))


def checked(target):
    """Return what the import hook makes of a function (see tests/conftest.py)."""
    return jaxtyping.jaxtyped(typechecker=beartype)(target)


def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return left @ right


def row_sums(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    return matrix.sum(0)


def test_dimensions_of_one_name_are_equal() -> None:
    multiply = checked(product)
    assert multiply(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert multiply(torch.ones(5, 1), torch.ones(1, 4)).shape == (5, 4)
    with pytest.raises(BeartypeCallHintViolation):
        multiply(torch.ones(2, 3), torch.ones(4, 3))


def test_an_answer_has_the_dimensions_of_the_arguments() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        checked(row_sums)(torch.ones(2, 3))


def test_calls_in_calls_have_dimensions_of_their_own() -> None:
    multiply = checked(product)

    def twice(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rows"]:
        return multiply(matrix, matrix.T)

    assert checked(twice)(torch.ones(2, 3)).shape == (2, 2)


def test_fields_of_a_dataclass_are_checked() -> None:
    moments = InputMoments.from_samples(torch.ones(4, 3))
    with pytest.raises(BeartypeCallHintViolation):
        InputMoments(moments.covariance, torch.ones(2), 4)


def test_what_has_no_shapes_is_left_as_it_is() -> None:
    assert checked(test_what_has_no_shapes_is_left_as_it_is) is test_what_has_no_shapes_is_left_as_it_is


@pytest.mark.usefixtures("as_users_run")
def test_users_meet_no_check() -> None:
    assert checked(row_sums)(torch.ones(2, 3)).shape == (3,)


def test_no_function_in_a_function_has_shapes() -> None:
    """Such a function is not checked (see tests/helpers/checked_shapes.py): its shapes would be words."""
    for file in CHECKED:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        outer = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for inner in (node for each in outer for node in ast.walk(each) if node is not each):
            if isinstance(inner, ast.FunctionDef):
                signature = [inner.args, *([inner.returns] if inner.returns else [])]
                words = [part.value for each in signature for part in ast.walk(each) if isinstance(part, ast.Constant)]
                assert not any(isinstance(word, str) for word in words), f"{file}: {inner.name} at {inner.lineno}"
