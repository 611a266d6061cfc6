"""A picture of matplotlib as SVG within a page: in the page's own colours and font, with words that can be read out."""

import re
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SALT = "optprune"
COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "first": "#000004",
    "second": "#000005",
    "third": "#000006",
    "fourth": "#000007",
}
"""the colours that a picture is drawn in: each stands for the page's own of that name, light or dark"""
SETTINGS = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": SALT,
    "svg.image_inline": True,
    "text.parse_math": False,  # a name is no formula
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
"""what a figure is to be drawn with, on top of matplotlib's own defaults and not of the user's"""


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """The figure as an <svg> element whose ids begin with the name, the same bytes for the same figure."""
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    _take_away(root)
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


def _take_away(root: ElementTree.Element) -> None:
    """Drop the metadata, the style that would hold for the whole page, and comments' line ends."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
        if _local(parent.tag) != "text":
            parent.text = None
        for child in parent:
            child.tail = None


def _local(name: str) -> str:
    """A name without its namespace, which HTML has no use for."""
    return name.rpartition("}")[2]


def _named(value: str, name: str) -> str:
    """A value whose reference to a part is to the part's name in the page."""
    value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", value)
    return re.sub(r"^#(?![0-9a-f]{6}$)([\w-]+)$", rf"#{name}-\1", value)


def _themed(value: str) -> str:
    """A value with the page's colours for those of the picture, and of a font the size only."""
    value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]*; ?", "", value)
    names = {code: f"var(--{name})" for name, code in COLOURS.items()}
    return re.sub(r"(?<=[ :])#[0-9a-f]{6}", lambda found: names.get(found[0], "currentColor"), value)


def _rounded(value: str) -> str:
    """A value whose coordinates have a hundredth of a point, which nobody sees, and half the bytes."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
