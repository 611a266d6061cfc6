"""No package index has optprune, and its name there is anybody's: no word of this repository installs it by name."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from optprune.system.wording import install

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "docs", "notebooks", "optprune", "tests")
KINDS = {".py", ".md", ".html", ".ipynb", ".yaml", ".yml", ".toml", ".cff"}
BY_NAME = re.compile(r"\bpip3?\s+install\s+(?:-\S+\s+)*[\\\"'`]*optprune\b")


def by_name(text: str) -> list[str]:
    """The words of a text that install optprune by its name."""
    return BY_NAME.findall(text)


def files() -> Iterator[Path]:
    """The texts of this repository, without this test."""
    yield from (path for path in ROOT.iterdir() if path.suffix in KINDS or path.name in ("Makefile", "Dockerfile"))
    for folder in FOLDERS:
        found = (path for path in (ROOT / folder).rglob("*") if path.suffix in KINDS and path != Path(__file__))
        yield from found


def test_nothing_says_to_install_optprune_by_name() -> None:
    read = {path: path.read_text(encoding="utf-8") for path in files()}
    assert {"README.md", "page.html", "large.md"} <= {path.name for path in read}
    assert {str(path.relative_to(ROOT)): found for path, text in read.items() if (found := by_name(text))} == {}


@pytest.mark.parametrize(
    "words",
    [
        "pip install optprune",
        "`pip install optprune[ray]`",
        "pip install 'optprune[llama,plot]'",
        'pip install --upgrade \\"optprune[onnx]\\"',
        "the tasks (`pip install\noptprune[ray]`):",
    ],
)
def test_such_words_are_noticed(words: str) -> None:
    assert by_name(words)


@pytest.mark.parametrize("words", ["pip install -e '.[plot]'", "pip install xllamacpp", "optprune prune DIR"])
def test_other_words_are_not(words: str) -> None:
    assert not by_name(words)


def test_words_name_extras_that_there_are() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.compile(r"(?:install\(\"([\w,]+)\"\)|-e\s+'\.\[([\w,]+)\]')")
    found = {
        name
        for path in files()
        for groups in named.findall(path.read_text(encoding="utf-8"))
        for name in "".join(groups).split(",")
    }
    assert {"llama", "plot", "testing"} <= found <= {*extras}


def test_the_words_are_true_anywhere() -> None:
    assert install("llama,plot") == "run pip install -e '.[llama,plot]' in optprune's checkout"
