"""Pictures of runs, audits and comparisons, drawn by matplotlib without a window."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from optprune.errors import InputError
from optprune.models import BlockShape
from optprune.report.block_values import BlockValues, is_attention, layers_by_path, shares, widths
from optprune.report.folder_audit import Audit
from optprune.report.reading import EvaluationReport
from optprune.report.records import LayerReport, Report
from optprune.report.stored import Original
from optprune.system.display import printable
from optprune.system.files import MARK
from optprune.system.wording import counted, install

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "first": "#000004",
    "second": "#000005",
    "third": "#000006",
    "fourth": "#000007",
}
"""placeholder colours: `inline_svg` replaces each by the colour of that name in the style of the page"""
PAGE_SETTINGS = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.image_inline": True,
    "text.parse_math": False,  # a name is not a formula
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}
"""settings for pictures within the page"""

WIDTH = 4.6
"""the width of a picture in inches: it fits the screen of a phone"""
LEFT, RIGHT, BELOW = 0.52, 0.06, 0.42
"""the margins of the panels, for numbers and labels, in inches"""
LARGEST = 1e30
"""the largest number that is drawn: matplotlib fails near the largest float"""
STYLES = (("first", "o"), ("second", "s"), ("third", "^"), ("fourth", "D"))
"""the colours and marks of the layers in one panel"""
FORMATS = ("png", "pdf", "svg")
COUNTS: dict[str, Callable[[BlockShape], int]] = {
    "MLP units": lambda shape: shape.mlp_width,
    "value dimensions of all KV heads": lambda shape: shape.kv_heads * shape.value_dim,
}
"""the counts of a block that the picture of an audit shows"""


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def plot_settings(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib's defaults and these settings, not the user's: equal figures give equal bytes."""
    import matplotlib

    keep = {"backend", "backend_fallback", "interactive", "webagg.port", "webagg.port_retries"}
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in keep}
    own = {**defaults, "svg.hashsalt": "optprune", **(settings or {})}
    with matplotlib.rc_context(own), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph ")  # names may be in any script
        yield


def picture_bytes(figure: "Figure", kind: str, **options: Any) -> bytes:
    """Return the bytes of a figure as a file of a kind in `FORMATS`, with our mark and without a date."""
    file = BytesIO()
    about = {
        "png": {"Software": MARK},
        "pdf": {"Creator": MARK, "CreationDate": None},
        "svg": {"Creator": MARK, "Date": None},
    }
    figure.savefig(file, format=kind, metadata=about[kind], **options)
    return file.getvalue()


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """Return a figure as an <svg> element for the page, with its colours and font and a text for screen readers.

    All ids begin with the name. Equal figures give equal bytes.
    """
    root = ElementTree.fromstring(picture_bytes(figure, "svg", transparent=True))
    _remove_extras(root)
    used = {
        found for part in root.iter() for value in part.attrib.values() for found in re.findall(r"#([\w-]+)", value)
    }
    for part in root.iter():
        part.tag = _local(part.tag)
        part.attrib = {_local(key): _rounded(_themed(_named(value, name))) for key, value in part.attrib.items()}
        if "id" in part.attrib:
            own = part.attrib.pop("id")
            if own in used:
                part.set("id", f"{name}-{own}")
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    for place, (tag, text) in enumerate({"title": title, "desc": description}.items()):
        part = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        part.text = text
        root.insert(place, part)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    return ElementTree.tostring(root, encoding="unicode")


def _remove_extras(root: ElementTree.Element) -> None:
    """Remove the metadata, the style, which would hold for the whole page, and the white space between elements."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
        if _local(parent.tag) != "text":
            parent.text = None
        for child in parent:
            child.tail = None


def _local(name: str) -> str:
    """Return a name without its XML namespace, which HTML does not use."""
    return name.rpartition("}")[2]


def _named(value: str, name: str) -> str:
    """Return a value with the name of the picture before each id that it refers to."""
    value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", value)
    return re.sub(r"^#(?![0-9a-f]{6}$)([\w-]+)$", rf"#{name}-\1", value)


def _themed(value: str) -> str:
    """Return a value with the colours of the page for placeholders, and of a font the size only."""
    value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]*; ?", "", value)
    names = {code: f"var(--{name})" for name, code in COLOURS.items()}
    return re.sub(r"(?<=[ :])#[0-9a-f]{6}", lambda found: names.get(found[0], "currentColor"), value)


def _rounded(value: str) -> str:
    """Return a value with its coordinates rounded to a hundredth of a point, which halves the size."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)


def pictures(report: Report, evaluation: EvaluationReport | None = None) -> dict[str, str]:
    """Return a picture for each kind of figures in the report, as <svg> elements by name; none without matplotlib."""
    if not can_draw():
        return {}
    drawn = dict[str, str]()
    with plot_settings(PAGE_SETTINGS):
        if kept := [each for each in widths(report) if each.changed]:
            title = "Widths of every block, before and after"
            drawn["widths"] = _steps("widths", title, kept, shares_of=False)
        if kept := list(shares(report)):
            drawn["shares"] = _steps("shares", "Weights of every layer that are not zero", kept, shares_of=True)
        if report.layers:
            what = "Relative error of every layer's output"
            if svg := _by_layer("errors", what, report, lambda layer: layer.relative_error, logarithmic=True):
                drawn["errors"] = svg
            what = "Gap to the proved bound of every certified layer"
            if svg := _by_layer("gaps", what, report, lambda layer: layer.gap, logarithmic=False):
                drawn["gaps"] = svg
        if evaluation is not None and (svg := _along(evaluation)):
            drawn["along"] = svg
    return drawn


def _figure(heights: Sequence[float], above: float) -> "tuple[Figure, list[Axes]]":
    """Return a figure with panels of these heights, one below the other, and a margin `above` each, in inches.

    The panels have fixed places: a layout that measures its texts takes longer than all the drawing.
    """
    from matplotlib.figure import Figure  # not through pyplot: no window, no state

    whole = sum(heights) + above * len(heights) + BELOW
    figure, panels, top = Figure(figsize=(WIDTH, whole)), list["Axes"](), whole
    for height in heights:
        top -= above + height
        place = (LEFT / WIDTH, top / whole, (WIDTH - LEFT - RIGHT) / WIDTH, height / whole)
        panels.append(figure.add_axes(place, sharex=panels[0] if panels else None))
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
    return figure, panels


def _steps(name: str, title: str, kept: Sequence[BlockValues], *, shares_of: bool) -> str:
    """Draw a panel for each value: before as a line, after as a filled area, a cross where a block keeps nothing."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, panels = _figure([0.5 if shares_of else 1.0] * len(kept), above=0.25)
    for axes, each in zip(panels, kept, strict=True):
        edges = [index - 0.5 for index in range(len(each.after) + 1)]
        empty = [index for index, (was, now) in enumerate(zip(each.before, each.after, strict=True)) if was and not now]
        axes.stairs(each.after, edges, fill=True, color=COLOURS["first"], alpha=0.85, linewidth=0)
        axes.stairs(each.before, edges, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (2, 1.5)))
        most = max(*each.before, *each.after, 1e-9)
        axes.plot(empty, [most * 0.12] * len(empty), "x", color=COLOURS["second"], markeredgewidth=1.4, markersize=5)
        axes.set_title(printable(each.name), pad=3)
        axes.set_ylim(0, most * 1.08)
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if shares_of:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_yticks([0, 0.5, 1])
        else:
            axes.set_yticks([0.0, most // 2, most] if most >= 8 else [0.0, most])
    panels[-1].set_xlabel("block")
    return inline_svg(figure, name, title, _range_text(kept, shares_of=shares_of))


def _range_text(kept: Sequence[BlockValues], *, shares_of: bool) -> str:
    said = []
    for each in kept:
        least, most = min(each.after), max(each.after)
        form: Callable[[float], str] = (lambda x: f"{x:.1%}") if shares_of else (lambda x: f"{x:.0f}")
        said.append(f"{each.name}: {form(least) if least == most else f'{form(least)} to {form(most)}'} by block")
    return "; ".join(said) + ". The table below the picture has the numbers."


def _by_layer(
    name: str, title: str, report: Report, value: Callable[[LayerReport], float | None], *, logarithmic: bool
) -> str | None:
    """Draw a value of every layer against its block; None without values.

    A filled mark is a layer with a proved bound, a hollow mark one without.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

    groups = [group for group in _groups(report) if any(_points(each, value, logarithmic) for each in group.values())]
    if not groups:
        return None
    figure, panels = _figure([1.6] * len(groups), above=0.42)
    for axes, group in zip(panels, groups, strict=True):
        for place, (path, layers) in enumerate(group.items()):
            points = _points(layers, value, logarithmic)
            colour, mark = STYLES[place % len(STYLES)]
            drawn = [number for number, _ in points]
            axes.plot(drawn, [y for _, y in points], "-", color=COLOURS[colour], linewidth=0.9, alpha=0.6)
            for certified in (True, False):
                some = [(number, y) for number, y in points if (layers[number].gap is not None) == certified]
                fill = COLOURS[colour] if certified else "none"
                label = path if certified == (sum(layer.gap is not None for layer in layers.values()) > 0) else None
                axes.plot(
                    [number for number, _ in some],
                    [y for _, y in some],
                    mark,
                    markeredgecolor=COLOURS[colour],
                    markerfacecolor=fill,
                    label=label,
                )
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True, axis="y", color=COLOURS["line"], linewidth=0.5)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0, handletextpad=0.2)
    panels[-1].set_xlabel("block")
    certified = sum(layer.gap is not None for layer in report.layers)
    layers = counted(len(report.layers), "layer")
    words = f"{layers}, {certified} with a proved bound (filled marks). The table has the numbers."
    return inline_svg(figure, name, title, words)


def _groups(report: Report) -> list[dict[str, Mapping[int, LayerReport]]]:
    """Return the layers by path, attention and MLP apart; as one group where there are at most two paths."""
    found = {printable(path): layers for path, layers in layers_by_path(report).items()}
    attention = {path: layers for path, layers in found.items() if is_attention(path)}
    others = {path: layers for path, layers in found.items() if not is_attention(path)}
    return [dict(found)] if len(found) <= 2 else [group for group in (attention, others) if group]


def _points(
    layers: Mapping[int, LayerReport], value: Callable[[LayerReport], float | None], logarithmic: bool
) -> list[tuple[int, float]]:
    """Return the (block, value) pairs that can be drawn."""
    found = ((number, value(layers[number])) for number in sorted(layers))
    least = 1 / LARGEST if logarithmic else -LARGEST
    return [(n, y) for n, y in found if y is not None and least <= y <= LARGEST]


def _along(evaluation: EvaluationReport) -> str | None:
    """Draw the divergence and the agreement along the context; None where there are fewer than two parts."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    along = [
        each
        for each in evaluation.along
        if each.divergence is not None and max(abs(each.divergence), abs(each.agreement)) <= LARGEST
    ]
    if len(along) < 2:
        return None
    edges = [along[0].first, *(each.last for each in along)]
    figure, (upper, lower) = _figure([1.0, 1.0], above=0.25)
    for axes, values, colour, title in (
        (upper, [each.divergence or 0.0 for each in along], "first", "divergence, nats a prediction"),
        (lower, [each.agreement for each in along], "second", "first choice the same"),
    ):
        axes.stairs(values, edges, color=COLOURS[colour], linewidth=1.6, baseline=None)
        axes.set_title(title, pad=3)
        axes.set_ylim(0, max(values) * 1.15 or 1.0)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.grid(visible=True, axis="y", color=COLOURS["line"], linewidth=0.5)
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set_xlabel("tokens that a prediction sees")
    first, last = along[0], along[-1]
    words = (
        f"Divergence from {first.divergence:.4f} nats over the first {first.last} predictions to {last.divergence:.4f} "
        f"from the {last.first}th on; first choice the same in {first.agreement:.1%} and {last.agreement:.1%}."
    )
    return inline_svg(figure, "along", "Divergence and agreement along the context", words)


def check_plot(file: Path) -> str:
    """Return the format of a picture by the name of its file; InputError where it cannot be drawn."""
    kind = file.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"the plot {file} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    if not can_draw():
        raise InputError(f"a plot needs matplotlib, which is not installed: {install('plot')}")
    return kind


def plot_kept(found: Audit, kind: str) -> bytes:
    """Draw the units of each block and the share of its weights that are kept, as the bytes of a file of that kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with plot_settings():
        figure = Figure(figsize=(8, 7), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        original = found.original
        shapes = found.blocks if original is None else _aligned_shapes(found.blocks, original)
        for colour, (what, count) in enumerate(COUNTS.items()):
            upper.plot(range(len(shapes)), list(map(count, shapes)), ".-", color=f"C{colour}", label=what)
            if original is not None:
                before = list(map(count, original.shapes))
                upper.plot(range(len(before)), before, ":", color=f"C{colour}", label=f"{what} before")
        for path, kept in found.shares.items():
            lower.plot(range(len(kept)), kept, ".-", label=path)
        removed = (
            f"{found.zeros / (found.weights or 1):.1%} zeros"
            if found.removed is None
            else f"{found.removed:.1%} removed"
        )
        upper.set(ylabel="units", title=f"{Path(found.model).name}: {removed}", ylim=(0, None))
        of_what = "over the most in a block" if original is None else "of the original's"
        lower.set(xlabel="block", ylabel=f"weights kept {of_what}", ylim=(0, 1.05))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in (upper, lower):
            axes.legend(fontsize=8, ncols=2)
        return picture_bytes(figure, kind)


def _aligned_shapes(blocks: Sequence[BlockShape], original: Original) -> list[BlockShape]:
    """Return the shape of each block of the original as it is now; zeros for blocks that were removed."""
    left = dict(zip(original.left, blocks, strict=True))
    return [left.get(number, BlockShape(0, 0, 0)) for number in range(len(original.shapes))]
