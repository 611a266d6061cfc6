"""What a pruned model was before, as the report.json in its folder tells, and how much of it each block still has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optprune.models import BlockShape, Decoder
from optprune.report.audit import LayerPattern


@dataclass(frozen=True)
class Original:
    """The model that the last run pruned."""

    model: str
    """the name that the run called it by"""
    shapes: tuple[BlockShape, ...]
    """the shapes of its blocks"""
    left: tuple[int, ...]
    """the numbers of the blocks that are still there"""

    def weights(self, decoder: Decoder) -> int:
        """The linear weights it had."""
        return sum(map(decoder.weights_of, self.shapes))

    def sizes(self, decoder: Decoder) -> dict[str, tuple[int, int]]:
        """The outputs and inputs that the linear layers had which are still there, by their name now."""
        return {
            decoder.name(block, path): size
            for block, number in enumerate(self.left)
            for path, size in layer_sizes(decoder, self.shapes[number]).items()
        }


def original_of(decoder: Decoder, folder: str) -> Original | None:
    """What report.json says that a folder's model was; None where there is none, or one that tells of other weights."""
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        before, after = ([_shape(block[when]) for block in report["blocks"]] for when in ("before", "after"))
        left = tuple(index for index, shape in enumerate(after) if shape.parts)
        pairs = zip(map(_counts, before), map(_counts, after), strict=True)
        grown = any(new > old for pair in pairs for old, new in zip(*pair, strict=True))
        if grown or tuple(after[index] for index in left) != decoder.shapes():
            return None
        return Original(str(report["model"]), tuple(before), left)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def layer_sizes(decoder: Decoder, shape: BlockShape) -> dict[str, tuple[int, int]]:
    """The outputs and inputs of every linear layer in a block of this shape, zeros where the layer is not there."""
    names, heads, hidden = decoder.architecture, decoder.heads, int(decoder.model.config.hidden_size)
    queries = shape.kv_heads * heads.group
    outputs = {
        names.query: queries * heads.dim,
        names.key: shape.kv_heads * heads.dim,
        names.value: shape.kv_heads * shape.value_dim,
        **dict.fromkeys(names.mlp_producers, shape.mlp_width),
    }
    inputs = {names.output: queries * shape.value_dim, names.mlp_consumer: shape.mlp_width}
    return {path: (outputs[path], hidden) if path in outputs else (hidden, inputs[path]) for path in names.layers}


def shares_kept(
    decoder: Decoder, layers: Sequence[LayerPattern], original: Original | None
) -> dict[str, tuple[float, ...]]:
    """The weights of each kind of layer that are there and not zero, a block of the original, as a share of its own.

    Where the original is not known: in each block that is there, over the most in any.
    """
    there = {layer.name: layer.outputs * layer.inputs - layer.zeros for layer in layers}
    shapes = decoder.shapes() if original is None else original.shapes
    place = {block: index for index, block in enumerate(range(len(shapes)) if original is None else original.left)}
    sizes = [{path: rows * columns for path, (rows, columns) in layer_sizes(decoder, s).items()} for s in shapes]
    shares = {}
    for path in decoder.architecture.layers:
        widest = max(size[path] for size in sizes)
        kept = [there.get(decoder.name(place[b], path), 0) if b in place else 0 for b in range(len(shapes))]
        whole = [size[path] if original else widest for size in sizes]
        if widest:  # a block that never had the layer keeps nothing of it
            shares[path] = tuple(count / (full or 1) for count, full in zip(kept, whole, strict=True))
    return shares


def _shape(counts: Mapping[str, Any]) -> BlockShape:
    shape = BlockShape(**counts)
    if not all(type(count) is int and count >= 0 for count in _counts(shape)):
        raise TypeError("the numbers of a shape are whole")
    return shape


def _counts(shape: BlockShape) -> tuple[int, ...]:
    return tuple(asdict(shape).values())
