"""The house of the tests: one folder a room of the package, plain unique names, and no test file imports another."""

import ast
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOMS = {path.name for path in (TESTS.parent / "optprune").iterdir() if (path / "__init__.py").is_file()}
OF_THEIR_OWN = {"vocabulary", "helpers", "house", "torture"}
"""the modules of the package's root, what tests share, checks of the repository, and what every command must outlive"""
WITHOUT_TESTS = {"numerics"}
"""tested with the vocabulary that it belongs to"""
FILES = sorted(TESTS.glob("*/*.py"))


def imported(source: str) -> set[str]:
    """The modules that a file imports, anywhere in it; `from a import b` may mean a or a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    return found


def imported_tests(source: str) -> set[str]:
    return {name for name in imported(source) if any(part.startswith("test_") for part in name.split("."))}


def test_every_room_has_its_folder() -> None:
    folders = {path.name for path in TESTS.iterdir() if (path / "__init__.py").is_file()}
    assert folders == ROOMS - WITHOUT_TESTS | OF_THEIR_OWN
    assert {path.name for path in TESTS.glob("*.py")} == {"__init__.py", "conftest.py"}


def test_no_test_file_is_imported() -> None:
    assert {path.name: found for path in FILES if (found := imported_tests(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tests.solvers.test_fista import barely_apart",
        "from tests.solvers import test_fista as fista",
        "import tests.solvers.test_fista",
        "from . import test_fista",
        "def later():\n    from .test_fista import barely_apart",
    ],
)
def test_an_import_of_a_test_file_is_noticed(line: str) -> None:
    assert imported_tests(line)


def test_helpers_hold_no_tests_and_names_are_unique() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name.startswith("test_") == (path.parent.name != "helpers"), path
