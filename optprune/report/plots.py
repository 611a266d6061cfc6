"""Pictures of what a model keeps; matplotlib draws them."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from optprune.errors import InputError

FORMATS = ("png", "pdf", "svg")


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


def plot_kept(shares: Mapping[str, Sequence[float]], of_what: str, title: str, kind: str) -> bytes:
    """The share that each kind of layer keeps, block by block, as the bytes of a picture of that kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # Not through pyplot: no window, no state.
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for path, kept in shares.items():
        axes.plot(range(len(kept)), kept, ".-", label=path)
    axes.set(xlabel="block", ylabel=f"weights kept {of_what}", title=title, ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=8, ncols=2)
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()
