"""Picture of a comparison: quality against size and against time."""

from typing import Any

from optprune.comparison.results import COLUMNS, Comparison, Row
from optprune.report.drawings import picture_bytes, plot_settings

QUALITY = ("perplexity", "divergence", "agreement")
AGAINST = ("weights", "bytes", "seconds")
SCALES = {"weights": 1e6, "bytes": 2**20}
"""the units of the axes"""


def picture_of(comparison: Comparison) -> bytes:
    """Draw each measure of quality against weights left, bytes and seconds of pruning, as the bytes of an SVG file.

    Each recipe is a line and each sparsity a point: the mean over the seeds, with the standard deviation.
    """
    from matplotlib.figure import Figure

    with plot_settings():
        figure = Figure(figsize=(12, 10), layout="constrained")
        grid: Any = figure.subplots(len(QUALITY), len(AGAINST), sharey="row", sharex="col")
        dense, *rows = comparison.rows()
        recipes: dict[str, list[Row]] = {}
        for row in rows:
            recipes.setdefault(row.recipe, []).append(row)
        for across, against in enumerate(AGAINST):
            for down, quality in enumerate(QUALITY):
                axes = grid[down][across]
                for name, of_recipe in recipes.items():
                    _draw(axes, name, [row for row in of_recipe if row.figures], against, quality)
                axes.axhline(dense.mean(quality), color="grey", linestyle=":", label="dense")
            grid[-1][across].set_xlabel(_heading(against))
        for down, quality in enumerate(QUALITY):
            grid[down][0].set_ylabel(_heading(quality))
        grid[0][0].legend(fontsize=8)
        figure.suptitle(comparison.model)
        return picture_bytes(figure, "svg")


def _draw(axes: Any, name: str, rows: list[Row], against: str, quality: str) -> None:
    scale = SCALES.get(against, 1.0)
    places = [(row.mean(against) or 0.0) / scale for row in rows]
    values = [row.mean(quality) for row in rows]
    errors = [row.deviation(quality) or 0.0 for row in rows]
    axes.errorbar(places, values, yerr=errors, fmt=".-", capsize=2, label=name)


def _heading(what: str) -> str:
    units = {"weights": "linear weights left, millions", "bytes": "weights, MiB", "seconds": "seconds of pruning"}
    return units.get(what, COLUMNS[what][0])
