"""Pictures of what a model keeps; matplotlib draws them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from optprune.errors import InputError
from optprune.models import LayerPattern

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


def plot_kept(layers: Sequence[LayerPattern], blocks: str, title: str, kind: str) -> bytes:
    """The weights of each kind of layer that are there and not zero, block by block, over the most in any block.

    `blocks` is the path of the decoder blocks, with which the layers' names begin. The bytes of a picture of that kind.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    kept: dict[str, dict[int, int]] = {}
    whole: dict[str, int] = {}
    for layer in layers:
        number, _, path = layer.name.removeprefix(f"{blocks}.").partition(".")
        size = layer.outputs * layer.inputs
        kept.setdefault(path, {})[int(number)] = size - layer.zeros
        whole[path] = max(size, whole.get(path, 0))
    count = 1 + max(number for found in kept.values() for number in found)
    # Not through pyplot: no window, no state.
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for path, found in kept.items():
        # A block without the layer keeps nothing of it.
        axes.plot(range(count), [found.get(number, 0) / whole[path] for number in range(count)], ".-", label=path)
    axes.set(xlabel="block", ylabel="weights kept", title=title, ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=8, ncols=2)
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()
