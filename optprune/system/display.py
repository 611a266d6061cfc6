"""Display of objects as tables, in a terminal and in a notebook."""

import html
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported for tables only
    from rich.console import Group

WIDTH = 100
"""the largest number of characters in a line of a printed table"""


@dataclass(frozen=True)
class SummaryTable:
    """Title, facts by name, and rows under the heads of their columns."""

    title: str
    facts: Sequence[tuple[str, str]]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def to_rich(self) -> "Group":
        """Return the table for a console of rich; texts are not read as markup."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(show_header=False, box=None, pad_edge=False)
        for name, value in self.facts:
            facts.add_row(Text(printable(name), style="bold"), Text(printable(value)))
        parts = [Text(printable(self.title), style="bold"), facts]
        if self.rows:
            table = Table()
            for column in self.columns:
                table.add_column(Text(printable(column)), overflow="fold")
            for row in self.rows:
                table.add_row(*(Text(printable(value)) for value in row))
            parts.append(table)
        return Group(*parts)

    def to_text(self) -> str:
        """Return the table as plain text."""
        from rich.console import Console

        stream = io.StringIO()
        # In a notebook, rich would display the table instead of writing it.
        Console(file=stream, width=WIDTH, color_system=None, force_jupyter=False).print(self.to_rich())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def to_html(self) -> str:
        """Return the table as HTML; texts are escaped."""
        facts = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self.facts
        )
        parts = [f"<table><caption>{html.escape(self.title)}</caption>{facts}</table>"]
        if self.rows:
            head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
            body = "".join(
                f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in row)}</tr>" for row in self.rows
            )
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        return "".join(parts)


def printable(text: str) -> str:
    """Return a text with control characters escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class Displayed(ABC):
    """Object that prints as a table, in a terminal and in a notebook; its `repr` is one line."""

    @abstractmethod
    def summary_table(self) -> SummaryTable:
        """Return the table of the object."""

    def __str__(self) -> str:
        return self.summary_table().to_text()

    def __rich__(self) -> "Group":
        return self.summary_table().to_rich()

    def _repr_html_(self) -> str:
        return self.summary_table().to_html()
