"""No decision by the name of a class: a condition asks for the class itself, so that a subclass counts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import optprune

ROOT = Path(optprune.__file__).parent
UNNAMED = {"models/sources.py"}
"""files that know a class by its name alone: pyo3 makes that of its panics at run time, and no module has it"""


def decisions(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of comparisons and matches in which the name of a class is an operand."""
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            operands = [node.subject]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            operands = [node.func.value] if node.func.attr in ("startswith", "endswith") else []
        if any(map(is_name_of_a_class, operands)):
            yield node.lineno


def is_name_of_a_class(node: ast.expr) -> bool:
    """Whether an expression is type(x).__name__ or x.__class__.__name__, or the qualified name."""
    if not (isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__")):
        return False
    of = node.value
    by_type = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "type"
    return by_type or (isinstance(of, ast.Attribute) and of.attr == "__class__")


def test_nothing_is_decided_by_the_name_of_a_class() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 100, "the package was not found"
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in decisions(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert {place.partition(":")[0] for place in found} <= UNNAMED, "compare the class itself, by isinstance"


def test_a_decision_by_the_name_of_a_class_is_noticed() -> None:
    for text in (
        "if type(solver).__name__ == 'Wanda': pass",
        "x = 1 if solver.__class__.__name__ in NAMES else 2",
        "match type(solver).__qualname__:\n    case 'Wanda': pass",
        "found = type(x).__name__.startswith('Pruned')",
    ):
        assert list(decisions(ast.parse(text))) == [1], text
    assert list(decisions(ast.parse("said = f'{type(x).__name__} failed'"))) == []
