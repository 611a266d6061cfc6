"""Hook of mkdocs that adapts the links of a page to the site.

The pages link to files as a reader of the repository finds them. On the site a paragraph that consists of a link to a
Python file becomes the source of that file, or the API of the module that the link text names. A link to a notebook
leads to its page on the site. A link of a name in code to a heading of api.md leads to the entry of that name.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "reference" / "api.md"
SOURCE = re.compile(r"^\[`(optprune/[\w/]+\.py)`\]\((?:\.\./)+\1\)$", re.MULTILINE)
"""a paragraph that is a link to a file, with the file's path as its text"""
ROOM = re.compile(r"^\[`(optprune[\w.]*)`\]\((?:\.\./)+(optprune[\w/]*\.py)\)$", re.MULTILINE)
"""a paragraph that is a link to a file, with the module's name as its text"""
NOTEBOOK = re.compile(r"\]\(\.\./((?:\.\./)*notebooks/\w+)\.ipynb\)")
ENTRY = re.compile(r"\[`(\w+)`\]\(((?:[\w.]+/)*api\.md)#([\w-]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def on_page_markdown(markdown: str, /, **_: Any) -> str:
    """Return the page as the site shows it."""
    return for_the_site(markdown)


def for_the_site(markdown: str) -> str:
    """Return a page in which sources, entries of the API and pages of notebooks replace links to files."""
    markdown = SOURCE.sub(_source, markdown)
    markdown = ROOM.sub(_room, markdown)
    # The site keeps the notebooks inside docs/, one folder nearer than the repository does.
    markdown = NOTEBOOK.sub(r"](\1.md)", markdown)
    return ENTRY.sub(_entry, markdown)


def slug(heading: str) -> str:
    """Return the anchor of a heading, by the rule that code hosts and mkdocs share."""
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def rooms() -> dict[str, dict[str, Path]]:
    """Return the modules below each heading of api.md, with their files."""
    found: dict[str, dict[str, Path]] = {}
    for part in re.split(r"^(?=#+ )", API.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if heading := HEADING.match(part):
            found[slug(heading[1])] = {name: ROOT / file for name, file in ROOM.findall(part)}
    return found


def _source(found: re.Match[str]) -> str:
    """Return the source of a Python file as a block of code with a title."""
    text = (ROOT / found[1]).read_text(encoding="utf-8").rstrip()
    return f'``` {{.python title="{found[1]}"}}\n{text}\n```'


def _room(found: re.Match[str]) -> str:
    """Return the directive of mkdocstrings for a module."""
    return f"::: {found[1]}"


def _entry(found: re.Match[str]) -> str:
    """Return a link to the entry of a name, if a module below the heading lists the name."""
    for module, file in rooms().get(found[3], {}).items():
        if found[1] in public(file):
            return f"[`{found[1]}`]({found[2]}#{module}.{found[1]})"
    return found[0]


def public(file: Path) -> list[str]:
    """Return the names in a module's `__all__`, or, without one, its classes and functions without an underscore."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
