"""A page of HTML as a reader sees it: parsed by the standard library, with what is wrong in it."""

import html.parser
import re
from dataclasses import dataclass, field

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    inside: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, *tags: str) -> list["Element"]:
        """The elements of these tags in it, or all of them, in their order."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                found += [part] if not tags or part.tag in tags else []
                found += part.all(*tags)
        return found

    def one(self, name: str) -> "Element":
        """The element of this id."""
        (found,) = [part for part in self.all() if part.attributes.get("id") == name]
        return found

    def tables(self) -> dict[str, list[list[str]]]:
        """The rows of each table, the head first, by its caption."""
        return {
            table.all("caption")[0].text: [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]
            for table in self.all("table")
        }


class _Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.faults.append(f"<{tag}> has an attribute twice: {names}")
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1].tag != tag:
            self.faults.append(f"</{tag}> at {self.getpos()} closes <{self.open[-1].tag}>")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parsed(page: str) -> Element:
    """The root of a page that is well formed."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.faults == []
    assert parser.open == [parser.root], [element.tag for element in parser.open]
    return parser.root


def ids(root: Element) -> list[str]:
    return [part.attributes["id"] for part in root.all() if "id" in part.attributes]


def references(root: Element) -> set[str]:
    """The ids that something in the page points to."""
    found: set[str] = set()
    for part in root.all():
        for name, value in part.attributes.items():
            found |= set(re.findall(r"url\(#([^)]*)\)", value))
            if name == "href" and value.startswith("#"):
                found.add(value[1:])
            if name in ("aria-labelledby", "for"):
                found |= set(value.split())
    return found


def loaded(root: Element) -> list[str]:
    """What a browser would fetch or run: elements that do, and addresses in attributes and styles."""
    active = ("script", "link", "img", "iframe", "object", "embed", "image", "base", "form", "audio", "video", "source")
    found = [part.tag for part in root.all(*active)]
    for part in root.all():
        for name, value in part.attributes.items():
            if name.startswith("on") or (name in ("href", "src", "srcset", "data") and not value.startswith("#")):
                found.append(f"{part.tag} {name}={value}")
            if re.search(r"url\((?!#)|javascript:|https?:", value):
                found.append(f"{part.tag} {name}={value}")
    for style in root.all("style"):
        found += re.findall(r"@import|url\([^)]*\)|https?:\S*", style.text)
    return found
