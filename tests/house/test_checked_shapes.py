"""What the tests check at run time: the shapes in the signatures of the functions of modules and classes."""

import ast
from pathlib import Path

import jaxtyping
import pytest
import torch

from optprune.moments import InputMoments

ROOT = Path(__file__).parents[2] / "optprune"
CHECKED = [
    *(ROOT / f"{name}.py" for name in ("metric", "moments", "patterns")),
    *sorted((ROOT / "problems").rglob("*.py")),
    *sorted((ROOT / "solvers").rglob("*.py")),
]


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        InputMoments.from_samples(torch.zeros(3))


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
