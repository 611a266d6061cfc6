"""What a report says, block by block: widths, shares, and the layers that were solved."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from optprune.report.records import LayerReport, Report

FIELDS = {"mlp_width": "MLP units", "kv_heads": "KV heads", "value_dim": "value dimensions of a head"}
"""what the numbers of a block's shape are called"""
PLACE = re.compile(r"(?:.*\.)?(\d+)\.(.+)")
"""a layer's name: the number of its block, and its path in it"""


@dataclass(frozen=True)
class BlockValues:
    """What every block keeps of something."""

    name: str
    before: tuple[float, ...]
    """how much there was, by block"""
    after: tuple[float, ...]

    @property
    def changed(self) -> bool:
        """Whether any block keeps less than it had."""
        return self.before != self.after


def widths(report: Report) -> tuple[BlockValues, ...]:
    """What the blocks had and have: MLP units, KV heads, value dimensions of a head. Nothing of a report without."""
    return tuple(
        BlockValues(
            what,
            tuple(float(getattr(change.before, field)) for change in report.blocks),
            tuple(float(getattr(change.after, field)) for change in report.blocks),
        )
        for field, what in FIELDS.items()
        if report.blocks
    )


def shares(report: Report) -> tuple[BlockValues, ...]:
    """The share of single weights that each kind of layer keeps, by block, where the recipe prunes single weights.

    A layer that the report does not tell of keeps all, and one that is gone with its sub-block keeps none.
    """
    if pattern_of(report) is None:
        return ()
    found: list[BlockValues] = []
    for path, layers in layers_by_path(report).items():
        after = [1.0] * block_count(report)
        for number, layer in layers.items():
            after[number] = layer.kept / layer.units if layer.units else 1.0
        for number in removed_with(report, path) if report.blocks else ():
            after[number] = 0.0
        found.append(BlockValues(path, (1.0,) * len(after), tuple(after)))
    return tuple(found)


def removed_with(report: Report, path: str) -> list[int]:
    """The blocks whose sub-block with a layer of this path is gone."""
    field = "kv_heads" if is_attention(path) else "mlp_width"
    return [number for number, change in enumerate(report.blocks) if not getattr(change.after, field)]


def pattern_of(report: Report) -> str | None:
    """The pattern of the zeros where a recipe prunes single weights."""
    units = report.recipe.get("units")
    if isinstance(units, dict) and "weights" in units:
        return str(units["weights"])
    return "unstructured" if units == "weights" else None


def layers_by_path(report: Report) -> Mapping[str, Mapping[int, LayerReport]]:
    """The layers that were solved, by their path in a block and the number of the block."""
    found: dict[str, dict[int, LayerReport]] = {}
    for layer in report.layers:
        place = PLACE.fullmatch(layer.name)
        if place is not None and int(place[1]) < block_count(report):
            found.setdefault(place[2], {})[int(place[1])] = layer
    return found


def block_count(report: Report) -> int:
    """How many blocks the model had; without a list of them, as many as there are numbers among the layers'."""
    if report.blocks:
        return len(report.blocks)
    numbers = {place[1] for layer in report.layers if (place := PLACE.fullmatch(layer.name)) is not None}
    return len(numbers)


def is_attention(path: str) -> bool:
    """Whether a layer of this path in a block is one of attention."""
    return "att" in path
