"""A docstring stands alone: it says what a thing is or does, and does not begin in the middle, with "of" or "by"."""

import ast
from collections.abc import Iterator
from pathlib import Path

import optprune

ROOT = Path(optprune.__file__).parent
FRAGMENTS = ("of", "by", "on", "in", "as", "from", "to", "with", "without", "per", "that", "at")


def fragments(name: str, source: str) -> Iterator[str]:
    """The docstrings of a file, those of attributes too, that begin in the middle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = node.value.value.split()[0]
            if first in FRAGMENTS:
                yield f"{name}:{node.lineno} {node.value.value.splitlines()[0]}"


def test_no_docstring_begins_in_the_middle() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 100, "the package was not found"
    assert [found for file in files for found in fragments(str(file.relative_to(ROOT)), file.read_text("utf-8"))] == []


def test_a_fragment_is_noticed() -> None:
    assert list(fragments("x.py", 'class A:\n    kind: str\n    """of problem"""\n')) == ["x.py:3 of problem"]
    assert not list(fragments("x.py", 'class A:\n    """Of a problem."""\n    kind: str\n    """the kind"""\n'))
