"""Results of a comparison: by cell, averaged over seeds, as a table and as a picture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

from optprune.comparison.grid import Cell
from optprune.report.drawings import (
    COLOURS,
    PAGE_SETTINGS,
    STYLES,
    can_draw,
    inline_svg,
    picture_bytes,
    plot_settings,
)
from optprune.report.simple_page import SimplePage
from optprune.system.files import json_text

DENSE = "dense"
QUALITY = ("perplexity", "divergence", "agreement")
AGAINST = ("weights", "bytes", "seconds")
SCALES = {"weights": 1e6, "bytes": 2**20}
"""units of the axes"""
MARKS = (".", "s", "^", "D", "x")
"""marks of the recipes, one after another where colours repeat"""


@dataclass(frozen=True)
class Figures:
    """Measurements of a model."""

    perplexity: float
    divergence: float
    """KL(dense || model), in nats a prediction"""
    agreement: float
    """share of predictions with the same most likely token as the dense model's"""
    sparsity: float
    """share of the decoder blocks' linear weights that are removed"""
    weights: int
    """number of these weights that are not zero"""
    bytes: int
    """size of the weights as stored, zeros included"""
    seconds: float
    """seconds that pruning takes alone, including statistics that other cells have measured"""
    prefill: float | None = None
    """prompt tokens per second, where speed is measured"""
    decode: float | None = None
    """decoded tokens per second, where speed is measured"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellResult:
    """Result of a cell: figures, or a sentence that says why there are none."""

    cell: Cell
    figures: Figures | None
    failure: str = ""
    spent: float = 0.0
    """seconds that pruning took here, without statistics that other cells have measured"""


@dataclass(frozen=True)
class Row:
    """Cells of one recipe and sparsity, which differ in their seeds."""

    recipe: str
    sparsity: float | None
    """the requested sparsity; None for the dense model"""
    figures: tuple[Figures, ...]
    failures: tuple[str, ...] = ()

    def values(self, figure: str) -> list[float]:
        """Return a figure by its name, for every seed that has it."""
        found = (getattr(figures, figure) for figures in self.figures)
        return [float(value) for value in found if value is not None]

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure over the seeds, or None without values."""
        values = self.values(figure)
        return mean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Return the sample standard deviation of a figure over the seeds, or None with fewer than two values."""
        values = self.values(figure)
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
"""columns of the table: the figure, its heading, and the format of a value"""
WITHOUT_DEVIATION = ("weights", "bytes")
"""figures whose deviation is not shown"""


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison; printed as a table."""

    model: str
    dense: Figures
    results: tuple[CellResult, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """options of the comparison"""

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for each cell without figures."""
        return tuple(f"{result.cell}: {result.failure}" for result in self.results if result.figures is None)

    def rows(self) -> list[Row]:
        """Return rows for the dense model, then for each recipe at each sparsity, in the requested order."""
        groups: dict[tuple[str, float], list[CellResult]] = {}
        for result in self.results:
            groups.setdefault((result.cell.recipe, result.cell.sparsity), []).append(result)
        rows = [Row(DENSE, None, (self.dense,))]
        for (recipe, sparsity), results in groups.items():
            figures = tuple(result.figures for result in results if result.figures is not None)
            failures = tuple(result.failure for result in results if result.figures is None)
            rows.append(Row(recipe, sparsity, figures, failures))
        return rows

    def markdown(self) -> str:
        """Return the table as Markdown, with the texts it was measured on."""
        head, *body = self._cells()
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in body)]
        notes = [f"- {sentence}" for sentence in self._sentences()]
        return "\n".join([f"# {self.model}", "", *lines, "", *notes]) + "\n"

    def to_json(self) -> str:
        """Return all figures of all cells, with means and deviations, as JSON."""
        rows = []
        for row in self.rows():
            found = {name: {"mean": row.mean(name), "deviation": row.deviation(name)} for name in COLUMNS}
            rows.append({"recipe": row.recipe, "sparsity": row.sparsity, "seeds": len(row.figures), **found})
        cells = [asdict(result) for result in self.results]
        return json_text(
            {"model": self.model, "options": self.options, "dense": asdict(self.dense), "rows": rows, "cells": cells}
        )

    def verdict(self) -> str:
        """Return, for each sparsity, the recipe whose predictions are closest to the dense model's, in sentences."""
        _, *rows = self.rows()
        sentences = [f"The dense model has a perplexity of {self.dense.perplexity:.2f}."]
        for sparsity in dict.fromkeys(row.sparsity for row in rows):
            there = [row for row in rows if row.sparsity == sparsity and row.figures]
            if not there:
                sentences.append(f"At a sparsity of {sparsity:g} no recipe gave a model.")
                continue
            best, *others = sorted(there, key=lambda row: row.mean("divergence") or 0.0)
            beside = f", before {others[0].recipe} with {_formatted(others[0], 'divergence')}" if others else ""
            sentences.append(
                f"At a sparsity of {sparsity:g} {best.recipe} is closest to it, {_formatted(best, 'divergence')} nats "
                f"a prediction{beside}; its perplexity is {_formatted(best, 'perplexity')}."
            )
        return " ".join(sentences)

    def page(self) -> str:
        """Return the page as HTML, in one file without scripts; without matplotlib it has no picture."""
        head, *body = self._cells()
        title = f"{self.model}: recipes compared"
        pictures = ((_page_picture(self, title), "A point for each sparsity."),) if can_draw() else ()
        return SimplePage(
            title=title,
            lead=self.verdict(),
            pictures=pictures,
            caption="Recipes at each sparsity",
            head=tuple(head),
            rows=tuple(map(tuple, body)),
            sentences=tuple(self._sentences()),
        ).html()

    def __str__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._sentences()])

    def _repr_markdown_(self) -> str:
        """Return the table for a notebook."""
        return self.markdown()

    def _cells(self) -> list[list[str]]:
        rows = self.rows()
        shown = [figure for figure in COLUMNS if any(row.values(figure) for row in rows)]
        table = [["recipe", "requested", "seeds", *(COLUMNS[figure][0] for figure in shown)]]
        for row in rows:
            requested = "" if row.sparsity is None else f"{row.sparsity:g}"
            seeds = "" if row.sparsity is None else str(len(row.figures))
            cells = [_formatted(row, figure) for figure in shown]
            if not row.figures:
                cells[0] = "failed"
            table.append([row.recipe, requested, seeds, *cells])
        return table

    def _sentences(self) -> Iterator[str]:
        options = self.options
        if options:
            generated = options.get("the number of generated windows")
            more = f" and {generated} that the dense model generated" if generated else ""
            yield (
                f"calibrated on {options['the calibration text']}, {options['the samples']} windows of "
                f"{options['the length of a window']} tokens{more}; evaluated on {options['the evaluation text']}, "
                f"{options['the windows evaluated']} windows; seconds are those of pruning alone"
            )
        yield from (f"failed: {sentence}" for sentence in self.failures)


def _formatted(row: Row, figure: str) -> str:
    """Return a figure of a row as text, with its deviation; an empty text where there is none."""
    value, deviation, text = row.mean(figure), row.deviation(figure), COLUMNS[figure][1]
    if value is None or (row.sparsity is None and figure == "seconds"):
        return ""
    return text(value) if deviation is None or figure in WITHOUT_DEVIATION else f"{text(value)} ± {text(deviation)}"


def picture_of(comparison: Comparison) -> bytes:
    """Return an SVG picture of each measure of quality against weights left, bytes and seconds of pruning.

    There is a line for each recipe and a point for each sparsity: the mean over the seeds, with the standard deviation.
    """
    with plot_settings():
        return picture_bytes(_drawn(comparison, [f"C{number}" for number in range(10)], "grey"), "svg")


def _page_picture(comparison: Comparison, title: str) -> str:
    """Return the picture as an <svg> element in the colours of the page."""
    with plot_settings(PAGE_SETTINGS):
        drawn = _drawn(comparison, [COLOURS[name] for name, _ in STYLES], COLOURS["muted"])
        return inline_svg(drawn, "comparison", title, "The table below has the numbers.")


def _drawn(comparison: Comparison, colours: Sequence[str], line: str) -> Any:
    """Return the figure, with the recipes in these colours in turn, in other marks where colours repeat."""
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    figure = Figure(figsize=(12, 10), layout="constrained")
    grid: Any = figure.subplots(len(QUALITY), len(AGAINST), sharey="row", sharex="col")
    dense, *rows = comparison.rows()
    recipes: dict[str, list[Row]] = {}
    for row in rows:
        recipes.setdefault(row.recipe, []).append(row)
    for across, against in enumerate(AGAINST):
        for down, quality in enumerate(QUALITY):
            axes = grid[down][across]
            for number, (name, own) in enumerate(recipes.items()):
                style = colours[number % len(colours)], MARKS[number // len(colours) % len(MARKS)]
                _draw(axes, name, [row for row in own if row.figures], against, quality, style)
            level = dense.mean(quality)
            axes.axhline(level, color=line, linestyle=":", label="dense")
        grid[-1][across].set_xlabel(_heading(against))
    for down, quality in enumerate(QUALITY):
        grid[down][0].set_ylabel(_heading(quality))
    grid[0][0].legend(fontsize=8)
    figure.suptitle(comparison.model)
    return figure


def _draw(axes: Any, name: str, rows: list[Row], against: str, quality: str, style: tuple[str, str]) -> None:
    scale = SCALES.get(against, 1.0)
    places = [(row.mean(against) or 0.0) / scale for row in rows]
    values = [row.mean(quality) for row in rows]
    errors = [row.deviation(quality) or 0.0 for row in rows]
    colour, mark = style
    axes.errorbar(places, values, yerr=errors, fmt=f"{mark}-", color=colour, capsize=2, label=name)


def _heading(figure: str) -> str:
    units = {"weights": "linear weights left, millions", "bytes": "weights, MiB", "seconds": "seconds of pruning"}
    return units.get(figure, COLUMNS[figure][0])
