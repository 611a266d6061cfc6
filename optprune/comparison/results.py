"""What a comparison found: cell by cell, and with the seeds of a recipe and a sparsity drawn together."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

from optprune.comparison.asked import Cell
from optprune.system.files import json_text

DENSE = "dense"


@dataclass(frozen=True)
class Figures:
    """What was measured of a model."""

    perplexity: float
    divergence: float
    """KL(dense || model), in nats a prediction"""
    agreement: float
    """the share of predictions in which both hold the same token for the most likely"""
    sparsity: float
    """the share of the decoder blocks' linear weights that is gone"""
    weights: int
    """how many of them are left that are not zero"""
    bytes: int
    """the size of the weights as they are stored, zeros included"""
    seconds: float
    """the seconds that pruning takes by itself, with what other cells have measured for it"""
    prefill: float | None = None
    """the prompt tokens that are read in a second, where that was asked for"""
    decode: float | None = None
    """the tokens that are decoded in a second, likewise"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellResult:
    """What came of a cell: figures, or a sentence on why there are none."""

    cell: Cell
    figures: Figures | None
    failure: str = ""
    spent: float = 0.0
    """the seconds that pruning took here, where other cells had measured some of it"""


@dataclass(frozen=True)
class Row:
    """The cells of a recipe and a sparsity, which differ in their seeds."""

    recipe: str
    sparsity: float | None
    """the share that was asked for; None of the dense model"""
    figures: tuple[Figures, ...]
    failures: tuple[str, ...] = ()

    def values(self, what: str) -> list[float]:
        """A figure by its name, of every seed that has it."""
        found = (getattr(figures, what) for figures in self.figures)
        return [float(value) for value in found if value is not None]

    def mean(self, what: str) -> float | None:
        """Its mean over the seeds; None where there is none."""
        values = self.values(what)
        return mean(values) if values else None

    def deviation(self, what: str) -> float | None:
        """Its standard deviation over the seeds, as of a sample; None where there are fewer than two."""
        values = self.values(what)
        return stdev(values) if len(values) > 1 else None


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "sparsity": ("removed", lambda value: f"{value:.1%}"),
    "perplexity": ("perplexity", _plain(2)),
    "divergence": ("divergence, nats", _plain(3)),
    "agreement": ("agreement", lambda value: f"{value:.1%}"),
    "weights": ("weights left", lambda value: f"{value:,.0f}"),
    "bytes": ("MiB", lambda value: f"{value / 2**20:.1f}"),
    "seconds": ("seconds", _plain(1)),
    "prefill": ("prefill, tokens/s", _plain(0)),
    "decode": ("decoding, tokens/s", _plain(1)),
}
"""the columns of the table: the figure, its heading, and how a value is told"""
RATHER_STEADY = ("weights", "bytes")
"""the figures of which no deviation is told"""


@dataclass(frozen=True)
class Comparison:
    """Recipes beside each other; printed, it is a table."""

    model: str
    dense: Figures
    results: tuple[CellResult, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """what was asked for"""

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for each cell that has no figures."""
        return tuple(f"{result.cell}: {result.failure}" for result in self.results if result.figures is None)

    def rows(self) -> list[Row]:
        """The dense model, then each recipe at each sparsity, in the order in which they were asked for."""
        groups: dict[tuple[str, float], list[CellResult]] = {}
        for result in self.results:
            groups.setdefault((result.cell.recipe, result.cell.sparsity), []).append(result)
        rows = [Row(DENSE, None, (self.dense,))]
        for (recipe, sparsity), of in groups.items():
            figures = tuple(result.figures for result in of if result.figures is not None)
            rows.append(Row(recipe, sparsity, figures, tuple(each.failure for each in of if each.figures is None)))
        return rows

    def markdown(self) -> str:
        """The table as Markdown, with what it was measured on."""
        head, *body = self._cells()
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in body)]
        told = [f"- {sentence}" for sentence in self._sentences()]
        return "\n".join([f"# {self.model}", "", *lines, "", *told]) + "\n"

    def to_json(self) -> str:
        """All figures of all cells, and the means and deviations, as JSON."""
        rows = []
        for row in self.rows():
            found = {what: {"mean": row.mean(what), "deviation": row.deviation(what)} for what in COLUMNS}
            rows.append({"recipe": row.recipe, "sparsity": row.sparsity, "seeds": len(row.figures), **found})
        cells = [asdict(result) for result in self.results]
        return json_text(
            {"model": self.model, "options": self.options, "dense": asdict(self.dense), "rows": rows, "cells": cells}
        )

    def __str__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._sentences()])

    def _repr_markdown_(self) -> str:
        """The table in a notebook."""
        return self.markdown()

    def _cells(self) -> list[list[str]]:
        rows = self.rows()
        shown = [what for what in COLUMNS if any(row.values(what) for row in rows)]
        table = [["recipe", "asked", "seeds", *(COLUMNS[what][0] for what in shown)]]
        for row in rows:
            asked = "" if row.sparsity is None else f"{row.sparsity:g}"
            seeds = "" if row.sparsity is None else str(len(row.figures))
            told = [_told(row, what) for what in shown]
            if not row.figures:
                told[0] = "failed"
            table.append([row.recipe, asked, seeds, *told])
        return table

    def _sentences(self) -> Iterator[str]:
        options = self.options
        if options:
            yield (
                f"calibrated on {options['the calibration text']}, {options['the samples']} windows of "
                f"{options['the length of a window']} tokens; evaluated on {options['the evaluation text']}, "
                f"{options['the windows evaluated']} windows; seconds are of pruning by itself"
            )
        yield from (f"failed: {sentence}" for sentence in self.failures)


def _told(row: Row, what: str) -> str:
    value, deviation, tell = row.mean(what), row.deviation(what), COLUMNS[what][1]
    if value is None or (row.sparsity is None and what == "seconds"):
        return ""
    return tell(value) if deviation is None or what in RATHER_STEADY else f"{tell(value)} ± {tell(deviation)}"
