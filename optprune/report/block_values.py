"""Values of a report by block: widths, shares of weights, and solved layers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optprune.models import ARCHITECTURES, BlockShape
from optprune.report.records import LayerReport, Report

FIELDS = {"mlp_width": "MLP units", "kv_heads": "KV heads", "value_dim": "value dimensions of a head"}
"""the numbers of a block's shape, in words"""
FURTHER = {"recurrent": "key heads, or groups, of the recurrent mixer"}
"""more such numbers, of models in which a block has some"""
BESIDE = frozenset(path for one in ARCHITECTURES.values() for path in one.beside)
"""the paths of layers that are in no sub-block"""
RECURRENT = frozenset(
    path
    for mixer in (one.recurrent for one in ARCHITECTURES.values() if one.recurrent is not None)
    for path in (*mixer.reads, mixer.output)
)
"""the paths of layers of recurrent mixers"""
ATTENTION = frozenset(path for one in ARCHITECTURES.values() for path in (one.query, one.key, one.value, one.output))
"""the paths of layers of attention"""
QUERIES = frozenset(one.query for one in ARCHITECTURES.values())
"""the paths of the query layers"""
PLACE = re.compile(r"(?:.*\.)?(\d+)\.(.+)")
"""the name of a layer: the number of its block, and its path within the block"""


@dataclass(frozen=True)
class BlockValues:
    """A value of every block, before and after pruning."""

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def changed(self) -> bool:
        """Whether the value changed in any block."""
        return self.before != self.after


def widths(report: Report) -> tuple[BlockValues, ...]:
    """Return the MLP units, KV heads and such of every block; none where the report lists no blocks."""
    return _pairs(report) + tuple(
        BlockValues(
            what,
            tuple(float(getattr(change.before, field)) for change in report.blocks),
            tuple(float(getattr(change.after, field)) for change in report.blocks),
        )
        for field, what in (FIELDS | FURTHER).items()
        if report.blocks and (field in FIELDS or any(getattr(change.before, field) for change in report.blocks))
    )


def _pairs(report: Report) -> tuple[BlockValues, ...]:
    """Return the rotary pairs of a head of queries and keys by block; none where no pair was removed.

    The shape of a block with all of them does not say how many: as many as the blocks with fewer had.
    """
    every = 0
    for path, layers in layers_by_path(report).items():
        for number, layer in layers.items() if path in QUERIES else ():
            change = report.blocks[number] if report.blocks else None
            if change is not None and change.after.kv_heads and change.after.pairs != change.before.pairs:
                every = max(every, layer.units // change.before.kv_heads)

    def kept(shapes: Iterable[BlockShape]) -> tuple[float, ...]:
        return tuple(float(shape.pairs or every) if shape.kv_heads else 0.0 for shape in shapes)

    before, after = ([getattr(change, when) for change in report.blocks] for when in ("before", "after"))
    return (BlockValues("rotary pairs of queries and keys", kept(before), kept(after)),) if every else ()


def shares(report: Report) -> tuple[BlockValues, ...]:
    """Return the share of its weights that each layer keeps, by its path; none unless the recipe prunes weights.

    A layer that is not in the report keeps all weights, and a layer of a removed sub-block keeps none.
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
    """Return the numbers of the blocks that lost the sub-block with this layer."""
    if path in BESIDE:
        return []
    field = "recurrent" if path in RECURRENT else "kv_heads" if is_attention(path) else "mlp_width"
    there = [(bool(getattr(change.before, field)), bool(getattr(change.after, field))) for change in report.blocks]
    return [number for number, (before, after) in enumerate(there) if before and not after]


def pattern_of(report: Report) -> str | None:
    """Return the pattern of zeros; None where the recipe does not prune single weights."""
    units = report.recipe.get("units")
    if isinstance(units, dict) and "weights" in units:
        return str(units["weights"])
    return "unstructured" if units == "weights" else None


def layers_by_path(report: Report) -> Mapping[str, Mapping[int, LayerReport]]:
    """Return the solved layers by their path within a block and the number of the block."""
    found: dict[str, dict[int, LayerReport]] = {}
    for layer in report.layers:
        place = PLACE.fullmatch(layer.name)
        if place is not None and int(place[1]) < block_count(report):
            found.setdefault(place[2], {})[int(place[1])] = layer
    return found


def block_count(report: Report) -> int:
    """Return the number of blocks of the dense model; without a list of blocks, the number of those with a layer."""
    if report.blocks:
        return len(report.blocks)
    numbers = {place[1] for layer in report.layers if (place := PLACE.fullmatch(layer.name)) is not None}
    return len(numbers)


def is_attention(path: str) -> bool:
    """Return whether the layer with this path belongs to attention, or to a recurrent mixer in its place."""
    return "att" in path or path in ATTENTION or path in RECURRENT  # the layers of a draft are not listed
