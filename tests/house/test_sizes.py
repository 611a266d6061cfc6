"""The house stays readable: no file of the package over 400 lines, and no function whose body is over 60."""

import ast
from collections.abc import Iterator
from pathlib import Path

import optprune

ROOT = Path(optprune.__file__).parent
FILES = [file for file in ROOT.rglob("*.py") if ROOT / "models" / "pruned" not in file.parents]
"""all but the modelling files, which are in the style of the transformers classes that they extend"""
MOST_LINES, MOST_BODY_LINES = 400, 60
"""a body goes from the docstring on: the signature of a command is the table of its options"""


def too_long(name: str, source: str) -> Iterator[str]:
    """The file, where it has too many lines, and its functions that have."""
    lines = len(source.splitlines())
    if lines > MOST_LINES:
        yield f"{name} has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.body[0].lineno + 1
            if length > MOST_BODY_LINES:
                yield f"{node.name} in {name} has {length} lines"


def test_no_file_and_no_function_is_too_long() -> None:
    assert len(FILES) > 100, "the package was not found"
    found = (sentence for file in FILES for sentence in too_long(file.name, file.read_text(encoding="utf-8")))
    assert not list(found), "give a second subject a file, or a function, of its own"


def test_what_is_too_long_is_noticed() -> None:
    long, longer = "class A:\n    def f(self):\n" + "        pass\n" * 60, "pass\n" * 400
    assert list(too_long("x.py", long)) == list(too_long("x.py", longer)) == []
    assert list(too_long("x.py", long + "        pass\n")) == ["f in x.py has 61 lines"]
    assert list(too_long("x.py", longer + "pass\n")) == ["x.py has 401 lines"]
