"""Functions stay readable: none has over 60 lines or twelve branches. A file is as long as its subject."""

import ast
from collections.abc import Iterator
from pathlib import Path

import optprune

ROOT = Path(optprune.__file__).parent
FILES = [file for file in ROOT.rglob("*.py") if ROOT / "models" / "pruned" not in file.parents]
"""all but the modelling files, which are in the style of the transformers classes that they extend"""
MOST_BODY_LINES, MOST_BRANCHES = 60, 12
"""a body goes from the docstring on: the signature of a command is the table of its options"""
BRANCHES = ast.If | ast.For | ast.While | ast.ExceptHandler | ast.Match


def too_long(name: str, source: str) -> Iterator[str]:
    """Name the functions of a file with too many lines or branches."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.body[0].lineno + 1
            branches = sum(isinstance(each, BRANCHES) for each in ast.walk(node))
            if length > MOST_BODY_LINES:
                yield f"{node.name} in {name} has {length} lines"
            if branches > MOST_BRANCHES:
                yield f"{node.name} in {name} has {branches} branches"


def test_no_function_is_too_long() -> None:
    assert len(FILES) > 100, "the package was not found"
    found = (sentence for file in FILES for sentence in too_long(file.name, file.read_text(encoding="utf-8")))
    assert not list(found), "split the function, or give what it decides to an object"


def test_a_long_function_is_noticed() -> None:
    long = "class A:\n    def f(self):\n" + "        pass\n" * 60
    branches = "def f(x):\n" + "    if x:\n        pass\n" * 12
    assert list(too_long("x.py", long)) == list(too_long("x.py", branches)) == []
    assert list(too_long("x.py", long + "        pass\n")) == ["f in x.py has 61 lines"]
    assert list(too_long("x.py", branches + "    if x:\n        pass\n")) == ["f in x.py has 13 branches"]
