"""The pages: every link leads somewhere in the repository and on the site, and no page shows a raw directive."""

import importlib.util
import json
import posixpath
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import optprune
from optprune.models import ARCHITECTURES
from tests.helpers.pages import ROOT, TEXTS

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(`{3,}).*?^\1|^(?: {4}|\t).*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ALL = {**TEXTS, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
CELLS = {
    path.relative_to(ROOT).as_posix(): "\n\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
"""the Markdown of each notebook"""
WORDED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
"""numbers that a page is not to spell, so that its counts are found by their digits"""


def _hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = _hook()


def links(text: str) -> list[str]:
    """The targets of a page's links that are no addresses."""
    spans = CODE.sub(lambda code: "code" if code[0].startswith("`") and "\n" not in code[0] else "", text)
    return [target for target in LINK.findall(spans) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", found).strip().lower()) for found in HEADING.findall(text)}


@pytest.mark.parametrize("page", [*ALL, *CELLS])
def test_every_link_leads_somewhere_in_the_repository(page: str) -> None:
    text = (ALL | CELLS)[page]
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.resolve().is_relative_to(ROOT) and file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", ALL)
def test_no_page_shows_a_directive_that_only_the_site_understands(page: str) -> None:
    assert not re.findall(r"--8<--|^:::|^!!!|^\?\?\?|\)\{[^}]*\}", ALL[page], re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("docs/")])
def test_every_link_leads_somewhere_on_the_site(page: str) -> None:
    site = {name.removeprefix("docs/"): HOOK.for_the_site(text) for name, text in TEXTS.items() if "docs/" in name}
    site |= {f"notebooks/{Path(name).stem}.md": text for name, text in CELLS.items()}
    entries = {
        f"{room}.{name}"
        for group in HOOK.rooms().values()
        for room, file in group.items()
        for name in HOOK.public(file)
    } | {room for group in HOOK.rooms().values() for room in group}
    here = page.removeprefix("docs/")
    for target in links(site[here]):
        path, _, anchor = target.partition("#")
        other = posixpath.normpath(posixpath.join(posixpath.dirname(here), path)) if path else here
        if other.startswith("pictures/"):
            assert (ROOT / "docs" / other).is_file()
            continue
        assert other in site, f"{page} links to {target}"
        known = anchors(site[other]) | (entries if other == "reference/api.md" else set())
        assert not anchor or anchor in known, f"{page} links to {target}"


def test_a_name_of_the_api_is_linked_to_its_own_entry_on_the_site() -> None:
    shown = HOOK.for_the_site(TEXTS["docs/guide/layer.md"])
    assert "[`LayerLoss`](../reference/api.md#optprune.problems.LayerLoss)" in shown
    assert "[`Statistics`](../reference/api.md#optprune.Statistics)" in shown


def test_the_site_shows_the_source_that_a_page_links_to_by_itself() -> None:
    shown = HOOK.for_the_site(TEXTS["docs/guide/extend.md"])
    assert (ROOT / "optprune" / "problems" / "penalised.py").read_text(encoding="utf-8").rstrip() in shown
    assert "../optprune/" not in shown


def test_api_has_every_public_package_and_the_site_its_docstrings() -> None:
    packages = {
        f"optprune.{path.name}" for path in (ROOT / "optprune").iterdir() if (path / "__init__.py").is_file()
    } - {"optprune.cli", "optprune.numerics", "optprune.system"}
    listed = {room for group in HOOK.rooms().values() for room in group}
    assert packages <= listed
    assert {f"::: {room}" for room in listed} <= set(HOOK.for_the_site(TEXTS["docs/reference/api.md"]).splitlines())
    assert set(HOOK.public(ROOT / "optprune" / "__init__.py")) == set(optprune.__all__)


def test_the_pages_count_the_architectures_right() -> None:
    counted = [
        (page, number)
        for page, text in TEXTS.items()
        for number in re.findall(r"(\w+)\s+\[?(?:families|architectures)\](?=\()", text)
        if number.isdigit() or number.lower() in WORDS
    ]
    assert {page for page, _ in counted} == {"README.md", "docs/guide/prune.md"}
    assert {number for _, number in counted} == {str(len(ARCHITECTURES))}, counted


def test_the_table_of_architectures_has_each_once() -> None:
    table = TEXTS["docs/reference/architectures.md"].partition("\n\nEach ")[0].partition("|---|")[2]
    rows = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(rows) == sorted(ARCHITECTURES)


def test_the_pages_count_notebooks_and_levels_right() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    assert f"{WORDED[len(CELLS)]} notebooks are stored".capitalize() in TEXTS["docs/index.md"]
    assert f"form {WORDED[len(contract['layers'])]} levels" in TEXTS["docs/explanation/design.md"]
    assert f"{WORDED[len(contract['layers'])]} levels, checked by".capitalize() in TEXTS["README.md"]


def test_the_picture_of_the_readme_is_that_of_the_first_page() -> None:
    def drawn(text: str) -> str:
        found = re.search(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
        assert found is not None
        return found[0]

    assert drawn(TEXTS["README.md"]) == drawn(TEXTS["docs/index.md"])
