"""Every global name that the package's functions read is defined: neither ruff nor pyright can say so here.

Shapes are strings in annotations (jaxtyping), so that both have their check of undefined names switched off.
"""

import builtins
import dis
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

import optprune


def modules() -> Iterator[ModuleType]:
    """Every module of the package but those that run something."""
    for found in pkgutil.walk_packages(optprune.__path__, "optprune."):
        if not found.name.endswith("__main__") and ".models.pruned." not in found.name:
            yield importlib.import_module(found.name)


def undefined(code: CodeType, defined: set[str]) -> set[str]:
    """The global names that a code object, or one inside it, reads and that are not defined."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"} - defined
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= undefined(constant, defined)
    return names


def test_every_name_is_defined() -> None:
    found = list(modules())
    assert len(found) > 100, "the package was not found"
    missing = {}
    for module in found:
        assert module.__file__ is not None
        code = compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec")
        names = undefined(code, {*vars(module), *vars(builtins)})
        if names:
            missing[module.__name__] = names
    assert missing == {}


def test_an_undefined_name_is_noticed() -> None:
    code = compile("def f():\n    return here + len(there)\n", "x.py", "exec")
    assert undefined(code, {*vars(builtins), "here"}) == {"there"}
