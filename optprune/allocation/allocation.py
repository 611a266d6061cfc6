"""Allocation: the numbers of units, or shares of weights, that every block keeps of a budget over the whole model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from optprune.errors import InputError
from optprune.models import BlockAllocation, BlockShape, Decoder
from optprune.system.files import read_json
from optprune.system.wording import counted, one_line, shown

NO_ALLOCATION = (
    "this is not an allocation, which has a sparsity and a list of blocks with mlp_width, kv_heads, value_dim and "
    "perhaps shares"
)


@dataclass(frozen=True)
class Allocation:
    """Numbers that every block keeps, and the resulting sparsity over the decoder blocks' linear weights."""

    blocks: tuple[BlockAllocation, ...]
    sparsity: float
    saves: str = ""
    """the part of the budget that it saves, in words, where the budget was not counted in weights"""

    @classmethod
    def of(cls, decoder: Decoder, blocks: Iterable[BlockAllocation], saves: str = "") -> "Allocation":
        """Return the allocation of these numbers with their sparsity in a model; InputError where they do not fit."""
        allocation = cls(tuple(blocks), 0.0, saves)
        allocation.check(decoder)
        total, kept = decoder.linear_weights(), 0.0
        for index, block in enumerate(allocation.blocks):
            whole = block.shape == decoder.shape(index)
            kept += decoder.weights_of(block.shape)
            if whole:  # single weights are counted in blocks that keep their shape
                sizes = {path: decoder.layer(index, path).weight.numel() for path in decoder.paths(index)}
                kept -= sum((1 - block.share(path)) * size for path, size in sizes.items())
        return replace(allocation, sparsity=1 - kept / total)

    def check(self, decoder: Decoder) -> None:
        """Raise InputError unless every block of the model can keep its numbers."""
        shapes = decoder.shapes()
        if len(self.blocks) != len(shapes):
            raise InputError(
                f"the allocation is for {counted(len(self.blocks), 'block')}, but the model has {len(shapes)}"
            )
        attention, needed = any(shape.kv_heads for shape in shapes), decoder.handed_on()
        if attention and not any(block.shape.kv_heads for block in self.blocks):
            raise InputError("the allocation keeps no attention: keep at least one")
        for index, (block, shape) in enumerate(zip(self.blocks, shapes, strict=True)):
            _check_pairs(index, block.shape, shape, decoder.heads.dim // 2)
            for name, kept in asdict(replace(block.shape, pairs=0)).items():
                there = asdict(shape)[name]
                if not 0 <= kept <= there or (name == "value_dim" and block.shape.kv_heads and not kept):
                    raise InputError(f"the allocation keeps {name} {shown(kept)} in block {index}, which has {there}")
                if kept not in (0, there):
                    request = f"the allocation keeps {name} {kept} in block {index}, which has {there}"
                    decoder.architecture.check_kept(name, kept, request)
            _check_handed_on(index, block.shape, shape, index in needed)
            narrower = block.shape.value_dim < shape.value_dim
            if 0 < block.shape.kv_heads < shape.kv_heads and (narrower or block.shape.pairs != shape.pairs):
                other = "value dimensions" if narrower else "pairs"
                raise InputError(f"the allocation removes KV heads and {other} of block {index}: choose one of the two")
            for path, share in block.shares.items():
                if path not in decoder.paths(index):
                    raise InputError(
                        f"the allocation names {one_line(path)} in block {index}, which has no such linear layer"
                    )
                if not 0 < share <= 1:
                    raise InputError(f"the allocation keeps a share {share:g} of {path} in block {index}: use (0, 1]")
            if block.shares and block.shape != shape:
                raise InputError(f"the allocation narrows block {index} and removes single weights: choose one")

    def with_shapes(self, decoder: Decoder, total: int) -> "Allocation":
        """Return the allocation with the model's present shapes, for `total` weights before; self where they agree."""
        shapes = decoder.shapes()
        if shapes == tuple(block.shape for block in self.blocks):
            return self
        kept = sum(map(decoder.weights_of, shapes))
        blocks = tuple(replace(block, shape=shape) for block, shape in zip(self.blocks, shapes, strict=True))
        return Allocation(blocks, 1 - kept / total)

    def lines(self) -> list[str]:
        """Return a line of text for each number that differs between blocks."""
        counts = [asdict(block.shape) for block in self.blocks]
        paths = dict.fromkeys(path for block in self.blocks for path in block.shares)
        numbers = {name: [str(count[name]) for count in counts] for name in counts[0]}
        numbers["pairs"] = [str(count["pairs"] or "all") if count["kv_heads"] else "0" for count in counts]
        if "all" not in numbers["pairs"] or set(numbers["pairs"]) == {"all", "0"}:
            del numbers["pairs"]
        numbers |= {f"kept of {path}": [f"{block.share(path):.0%}" for block in self.blocks] for path in paths}
        return [f"{what} by block: {' '.join(each)}" for what, each in numbers.items() if len(set(each)) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Return the allocation as plain data."""
        blocks = [
            block.shape.counts(("experts",)) | ({"shares": dict(block.shares)} if block.shares else {})
            for block in self.blocks
        ]
        return {"sparsity": self.sparsity, **({"saves": self.saves} if self.saves else {}), "blocks": blocks}

    def to_json(self) -> str:
        """Return the allocation as JSON that `from_json` reads."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Allocation":
        """Read an allocation, or that of a report.json; InputError when it is neither."""
        try:
            data = read_json(text, "it")
        except InputError as error:
            raise InputError(f"{NO_ALLOCATION}: {error}") from error
        return cls.from_dict(data.get("allocation", data) if isinstance(data, dict) else data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Allocation":
        """Return the allocation that `to_dict` wrote; InputError where the data are something else."""
        try:
            if not isinstance(data, Mapping):
                raise TypeError(f"it is {shown(data)}")
            blocks = []
            for entry in data["blocks"]:
                shares = {str(path): float(share) for path, share in entry.get("shares", {}).items()}
                blocks.append(BlockAllocation(_shape_in(entry), shares))
            return cls(tuple(blocks), float(data["sparsity"]), str(data.get("saves", "")))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{NO_ALLOCATION}: {one_line(error)}") from error


def _check_pairs(index: int, kept: BlockShape, shape: BlockShape, every: int) -> None:
    """Raise InputError where a block cannot keep so many rotary pairs, of which a head of the dense model has `every`.

    Zero stands for all of them.
    """
    there, count = shape.pairs or every, kept.pairs or every
    if not kept.pairs and (not kept.kv_heads or not shape.pairs):
        return
    if not 0 < count <= there or not kept.kv_heads:
        raise InputError(f"the allocation keeps pairs {count} in block {index}, which has {there}")


def _check_handed_on(index: int, kept: BlockShape, shape: BlockShape, needed: bool) -> None:
    """Raise InputError where attention goes that later blocks need, or is said to have other layers than it has."""
    if needed and not kept.kv_heads:
        raise InputError(
            f"the allocation removes the attention of block {index}, whose keys and values go to later blocks or count "
            "the tokens of a cache: keep it"
        )
    if kept.kv_heads and kept.lacking != shape.lacking:
        raise InputError(f"the allocation keeps lacking {kept.lacking} in block {index}, which has {shape.lacking}")


def _shape_in(entry: Mapping[str, Any]) -> BlockShape:
    """Return the shape in an entry, beside its shares; TypeError where there is none."""
    counts = {name: count for name, count in entry.items() if name != "shares"}
    needed = {each.name: each.default is MISSING for each in fields(BlockShape)}
    for name in counts:
        if name not in needed:
            raise TypeError(f"a block has no field {shown(name)}")
    for name, must in needed.items():
        if must and name not in counts:
            raise TypeError(f"the block {shown(entry)} lacks {name}")
    shape = BlockShape(**counts)
    if not all(isinstance(number, int) for number in asdict(shape).values()):
        raise TypeError(f"the shape {shown(entry)} must be whole numbers")
    return shape


def everything(decoder: Decoder) -> Allocation:
    """Return the allocation that keeps all of every block."""
    return Allocation(tuple(BlockAllocation(shape) for shape in decoder.shapes()), 0.0)
