"""Notebooks and pages import public names only: what `optprune` gives, and the rooms that the API page lists."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import optprune
from tests.helpers.pages import BLOCKS, ROOT
from tests.helpers.tiny_models import save_tiny, tiny_llama

ROOMS = re.findall(
    r"^\[`(optprune[\w.]*)`\]\(", (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
)
PIECES = {page: "\n".join(blocks) for page, blocks in BLOCKS.items() if blocks} | {
    path.name: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}


def internals(code: str) -> Iterator[str]:
    """What code uses of optprune that is not public."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name) and alias.name not in ROOMS)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and is_ours(node.module):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not is_public(node.module, alias.name))
        elif isinstance(node, ast.Attribute):
            owner, private = ast.unparse(node.value), re.match("_(?!_)", node.attr)
            ours = owner.replace(".", "").isidentifier() and is_ours(owner)
            if private or (ours and f"{owner}.{node.attr}" not in ROOMS and not is_public(owner, node.attr)):
                yield f"{owner}.{node.attr}"


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "optprune"


def is_public(module: str, name: str) -> bool:
    """Whether a room lists a name, or as a single module defines it."""
    if module not in ROOMS:
        return False
    room = importlib.import_module(module)
    listed = getattr(room, "__all__", None)
    if listed is not None:
        return name in listed
    return not name.startswith("_") and getattr(getattr(room, name), "__module__", module) == module


@pytest.mark.parametrize("piece", PIECES)
def test_only_public_names_are_used(piece: str) -> None:
    assert list(internals(PIECES[piece])) == []


@pytest.mark.parametrize(
    "code",
    [
        "from optprune.calibration.moments_pass import collect",
        "import optprune.calibration.stream",
        "from optprune.system import files",
        "from optprune.models import units",
        "from optprune.metric import Tensor",
        "import optprune\noptprune.Decoder",
        "import optprune\noptprune.pruning.pipeline.Run",
        "run._targets(0)",
    ],
)
def test_what_is_not_public_is_told(code: str) -> None:
    assert list(internals(code))


def test_a_room_is_a_page_of_the_package() -> None:
    """No module below a room, and every name that a room lists is there."""
    for module in ROOMS:
        assert module.count(".") <= 1
        room = importlib.import_module(module)
        assert all(hasattr(room, name) for name in getattr(room, "__all__", ()))


def test_every_name_of_the_package_is_what_its_room_gives() -> None:
    assert optprune._HOMES.keys() == set(optprune.__all__)
    for name, room in optprune._HOMES.items():
        assert is_public(room, name)


def test_a_name_of_the_version_before_warns_once_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(optprune), "load", raising=False)
    save_tiny(tiny_llama(), tmp_path)
    with pytest.warns(DeprecationWarning, match=r"optprune\.load\(X\) is optprune\.load_model\(X\)\.model now"):
        load = optprune.load
    assert optprune.load is load
    assert type(load(tmp_path)) is type(optprune.load_model(tmp_path).model)
    monkeypatch.delitem(vars(optprune), "load")
