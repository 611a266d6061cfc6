"""Page of one table: a verdict, pictures, the table, and continuations side by side; HTML without scripts."""

from dataclasses import dataclass
from itertools import takewhile

from markupsafe import Markup

from optprune.report.html_page import page_environment, page_text


@dataclass(frozen=True)
class Continuation:
    """Continuation of a prompt by one model, up to where it parts from the reference, and from there on."""

    name: str
    same: str
    """the text that it has in common with the reference"""
    other: str
    """the text from there on"""

    @classmethod
    def beside(cls, name: str, text: str, reference: str) -> "Continuation":
        """Return the continuation, divided where it parts from the reference."""
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, reference, strict=False)))
        return cls(name, text[:count], text[count:])


@dataclass(frozen=True)
class Said:
    """Continuations of one prompt."""

    prompt: str
    texts: tuple[Continuation, ...]


@dataclass(frozen=True)
class SimplePage:
    """Content of a page."""

    title: str
    lead: str
    """the verdict"""
    caption: str
    """the caption of the table"""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    pictures: tuple[tuple[str, str], ...] = ()
    """<svg> elements with their captions"""
    sentences: tuple[str, ...] = ()
    """how it was measured, and notes"""
    said: tuple[Said, ...] = ()

    def html(self) -> str:
        """Return the page; equal content gives equal bytes."""
        template = page_environment().from_string(page_text("simple_page.html"))
        pictures = [(Markup(svg), caption) for svg, caption in self.pictures]
        return template.render(page=self, style=Markup(page_text("page.css")), pictures=pictures)
