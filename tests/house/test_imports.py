"""A module's private names, those with a leading underscore, are its own: no other module of optprune reaches them."""

import ast
from collections.abc import Iterator
from pathlib import Path

from grimp import build_graph

import optprune

ROOT = Path(optprune.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree: ast.AST) -> set[str]:
    """The private functions, classes, constants and attributes that a module makes itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def foreign(modules: dict[str, str]) -> Iterator[str]:
    """Where a module imports a private name, or reads a private attribute that only other modules define."""
    trees = {name: ast.parse(text) for name, text in modules.items()}
    own = {name: private_definitions(tree) for name, tree in trees.items()}
    ours = set().union(*own.values())
    for module, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                names = [part for part in (*parts, *(alias.name for alias in node.names)) if is_private(part)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".") if is_private(part)]
            # What no module of ours defines is torch's or transformers', such as nn.Module._parameters.
            elif isinstance(node, ast.Attribute) and node.attr in ours - own[module]:
                names = [node.attr]
            yield from (f"{module}:{node.lineno} {name}" for name in names)  # type: ignore[attr-defined]


def test_no_module_reaches_a_private_name_of_another() -> None:
    modules = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in ROOT.rglob("*.py")}
    assert len(modules) > 100, "the package was not found"
    assert not list(foreign(modules)), "make these names public, or move what uses them"


def test_every_way_to_reach_one_is_noticed() -> None:
    home = (
        "LIMIT = _LIMIT = 3\nclass Box:\n    def __init__(self):\n        self._content = 1\n    def _open(self): ...\n"
    )
    for number, line in enumerate(
        (
            "from home import _LIMIT",
            "from home import LIMIT, _LIMIT as limit",
            "from home._inner import LIMIT",
            "import home._inner",
            "import home\nhome._LIMIT",
            "import home\nhome.Box()._open()",
            "import home\nhome.Box()._content",
        )
    ):
        assert list(foreign({"home": home, "guest": line})), (number, line)
    for line in ("from home import LIMIT", "import home\nhome.Box().__class__", "layer._parameters"):
        assert not list(foreign({"home": home, "guest": line})), line


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports within functions and for type checkers count too."""
    graph, waiting = build_graph("optprune", cache_dir=None), dict[str, set[str]]()
    for module in graph.modules:
        waiting[module] = set(graph.find_modules_directly_imported_by(module))
    assert len(waiting) > 100, "the package was not found"
    # Remove modules whose imports are all removed: the rest is in circles, or imports one.
    while free := {module for module, imported in waiting.items() if not imported & waiting.keys()}:
        waiting = {module: imported for module, imported in waiting.items() if module not in free}
    assert not waiting, sorted(waiting)
