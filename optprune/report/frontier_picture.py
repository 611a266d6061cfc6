"""Picture of size against quality: dense models in fewer bits and pruned ones, dominated ones grey."""

from collections.abc import Sequence
from dataclasses import dataclass

from optprune.report.drawings import COLOURS, PAGE_SETTINGS, can_draw, inline_svg, plot_settings
from optprune.system.display import printable

FAR = 1.6
"""ratio to the best bits per byte beyond which points are drawn at the edge: a model that is destroyed tells nothing"""


@dataclass(frozen=True)
class Mark:
    """A point of the picture."""

    mib: float
    bits: float
    """bits per byte"""
    label: str
    dense: bool
    dominated: bool


def frontier_svg(marks: Sequence[Mark], title: str) -> str | None:
    """Return the picture as an <svg> element; None without matplotlib, or without points."""
    if not can_draw() or not marks:
        return None
    from matplotlib.figure import Figure  # not through pyplot: no window, no state

    with plot_settings(PAGE_SETTINGS):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        highest = FAR * min(mark.bits for mark in marks)
        for dense, colour, form, name in ((True, "first", "o", "dense"), (False, "second", "s", "pruned")):
            own = [mark for mark in marks if mark.dense is dense]
            for dominated in (True, False):
                some = [mark for mark in own if mark.dominated is dominated]
                shade = COLOURS["line" if dominated else colour]
                places = [mark.mib for mark in some], [min(mark.bits, highest) for mark in some]
                axes.plot(*places, form, color=shade, label=None if dominated else name, zorder=1 + (not dominated))
        best = sorted((mark for mark in marks if not mark.dominated), key=lambda mark: mark.mib)
        axes.step(
            [mark.mib for mark in best], [mark.bits for mark in best], where="post", color=COLOURS["muted"], zorder=0
        )
        for mark in best:
            axes.annotate(
                printable(mark.label), (mark.mib, mark.bits), xytext=(4, 4), textcoords="offset points", size=7
            )
        axes.set_xlabel("size, MiB")
        axes.set_ylabel("bits per byte")
        axes.set_xlim(left=0)
        axes.legend()
        words = "; ".join(f"{mark.label}: {mark.mib:.1f} MiB, {mark.bits:.4f}" for mark in best)
        return inline_svg(figure, "frontier", title, f"Not dominated: {words}.")
