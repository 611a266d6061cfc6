"""A hook of mkdocs: pages that are plain Markdown in the repository get what only the site has.

A page links to files as a reader of the repository finds them. On the site a paragraph that is a link to a Python file
becomes the source of that file, or the API of the package that its words name. A link to a notebook leads to its page
on the site, and a link of a name in code to a heading of api.md leads to the entry of that name.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"^\[`(optprune/[\w/]+\.py)`\]\(\.\./\1\)$", re.MULTILINE)
"""a paragraph that is a link to a file, which its words name"""
ROOM = re.compile(r"^\[`(optprune[\w.]*)`\]\(\.\./(optprune[\w/]*\.py)\)$", re.MULTILINE)
"""a paragraph that is a link to a file, whose words name the module"""
NOTEBOOK = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")
ENTRY = re.compile(r"\[`(\w+)`\]\(api\.md#([\w-]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def on_page_markdown(markdown: str, /, **_: Any) -> str:
    """Return the page as the site has it."""
    return for_the_site(markdown)


def for_the_site(markdown: str) -> str:
    """Return a page with sources, entries of the API and pages of notebooks in place of links to files."""
    markdown = SOURCE.sub(_source, markdown)
    markdown = ROOM.sub(_room, markdown)
    markdown = NOTEBOOK.sub(r"](notebooks/\1.md)", markdown)
    return ENTRY.sub(_entry, markdown)


def slug(heading: str) -> str:
    """Return the anchor of a heading, which code hosts and mkdocs make alike."""
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def rooms() -> dict[str, dict[str, Path]]:
    """Return the modules below each heading of api.md, with their files."""
    found: dict[str, dict[str, Path]] = {}
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for part in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        if heading := HEADING.match(part):
            found[slug(heading[1])] = {name: ROOT / file for name, file in ROOM.findall(part)}
    return found


def _source(found: re.Match[str]) -> str:
    """A Python file as a block of code with its name."""
    text = (ROOT / found[1]).read_text(encoding="utf-8").rstrip()
    return f'``` {{.python title="{found[1]}"}}\n{text}\n```'


def _room(found: re.Match[str]) -> str:
    """The directive of mkdocstrings for a module."""
    return f"::: {found[1]}"


def _entry(found: re.Match[str]) -> str:
    """A link to the entry of a name, where a module below the heading lists it."""
    for module, file in rooms().get(found[2], {}).items():
        if found[1] in public(file):
            return f"[`{found[1]}`](api.md#{module}.{found[1]})"
    return found[0]


def public(file: Path) -> list[str]:
    """The names that a module lists in __all__, or defines without an underscore where it has no list."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
