"""Pictures of what a model keeps; matplotlib draws them."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from optprune.errors import InputError
from optprune.models import BlockShape
from optprune.report.folder_audit import Audit
from optprune.report.original import Original

FORMATS = ("png", "pdf", "svg")
COUNTS: dict[str, Callable[[BlockShape], int]] = {
    "MLP units": lambda shape: shape.mlp_width,
    "value dimensions of all KV heads": lambda shape: shape.kv_heads * shape.value_dim,
}
"""what a picture shows of a block's shape"""


def check_plot(file: Path) -> str:
    """The kind of a picture of that name; InputError when none could be drawn."""
    kind = file.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"the plot {file} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("a plot needs matplotlib, which is not installed: pip install 'optprune[plot]'") from error
    return kind


def plot_kept(found: Audit, kind: str) -> bytes:
    """What each block holds and the share of its weights that it keeps, as the bytes of a picture of that kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # Not through pyplot: no window, no state.
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    original = found.original
    shapes = found.blocks if original is None else _in_places(found.blocks, original)
    for colour, (what, count) in enumerate(COUNTS.items()):
        upper.plot(range(len(shapes)), list(map(count, shapes)), ".-", color=f"C{colour}", label=what)
        if original is not None:
            before = list(map(count, original.shapes))
            upper.plot(range(len(before)), before, ":", color=f"C{colour}", label=f"{what} before")
    for path, kept in found.shares.items():
        lower.plot(range(len(kept)), kept, ".-", label=path)
    gone = (
        f"{found.zeros / (found.weights or 1):.1%} zeros" if found.removed is None else f"{found.removed:.1%} removed"
    )
    upper.set(ylabel="units", title=f"{Path(found.model).name}: {gone}", ylim=(0, None))
    of_what = "over the most in a block" if original is None else "of the original's"
    lower.set(xlabel="block", ylabel=f"weights kept {of_what}", ylim=(0, 1.05))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (upper, lower):
        axes.legend(fontsize=8, ncols=2)
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()


def _in_places(blocks: Sequence[BlockShape], original: Original) -> list[BlockShape]:
    """What is left of each block of the original; nothing of those that are gone."""
    left = dict(zip(original.left, blocks, strict=True))
    return [left.get(number, BlockShape(0, 0, 0)) for number in range(len(original.shapes))]
