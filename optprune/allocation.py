"""How a budget over the whole model is divided over its blocks: each has its own numbers, whoever chose them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optprune.errors import InputError
from optprune.models import BlockShape, Decoder
from optprune.values import one_line, read_json, shown

NARROWED = {
    "mlp": ("mlp_width",),
    "vo": ("value_dim",),
    "kv-groups": ("kv_heads",),
    "all": ("value_dim", "mlp_width"),
}
"""the fields of a shape that a recipe's units make smaller"""
STEPS = 5
"""where the same share goes from every block, only a head of so many multiples is narrowed by whole multiples: in a
smaller one a sparsity of 10 percent, FASP's least, would round to no value dimension at all"""
NO_ALLOCATION = (
    "this is not an allocation, which has a sparsity and a list of blocks with mlp_width, kv_heads, value_dim and "
    "perhaps shares"
)


@dataclass(frozen=True)
class BlockAllocation:
    """What one block keeps."""

    shape: BlockShape
    """a zero for mlp_width or kv_heads removes the MLP or the attention whole"""
    shares: Mapping[str, float] = field(default_factory=dict)
    """the share of single weights kept in a layer, by its path in the block; a layer that is not named keeps all"""

    def share(self, path: str) -> float:
        """The share of single weights that a layer keeps."""
        return self.shares.get(path, 1.0)


@dataclass(frozen=True)
class Allocation:
    """What every block keeps, and the sparsity that this comes to over the decoder blocks' linear weights."""

    blocks: tuple[BlockAllocation, ...]
    sparsity: float
    saves: str = ""
    """what it saves of the budget that it was made for, in words, where that was not counted in weights"""

    @classmethod
    def of(cls, decoder: Decoder, blocks: Iterable[BlockAllocation], saves: str = "") -> "Allocation":
        """The allocation of these numbers, with the sparsity that they come to in this model; InputError if unfit."""
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
        """Raise InputError unless every block of the model can keep what is asked."""
        shapes = decoder.shapes()
        if len(self.blocks) != len(shapes):
            raise InputError(f"the allocation is for {len(self.blocks)} blocks, but the model has {len(shapes)}")
        if not any(block.shape.kv_heads for block in self.blocks):
            raise InputError("the allocation keeps no attention at all, so no token would see another: keep one")
        for index, (block, shape) in enumerate(zip(self.blocks, shapes, strict=True)):
            for name, kept in asdict(block.shape).items():
                there = asdict(shape)[name]
                if not 0 <= kept <= there or (name == "value_dim" and block.shape.kv_heads and not kept):
                    raise InputError(f"the allocation keeps {name} {shown(kept)} in block {index}, which has {there}")
            if 0 < block.shape.kv_heads < shape.kv_heads and block.shape.value_dim < shape.value_dim:
                raise InputError(
                    f"the allocation removes KV heads and value dimensions of block {index}: choose one of the two"
                )
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
        """What the blocks keep now, of so many linear weights: the same, unless the problems chose other shapes."""
        shapes = decoder.shapes()
        if shapes == tuple(block.shape for block in self.blocks):
            return self
        kept = sum(map(decoder.weights_of, shapes))
        blocks = tuple(replace(block, shape=shape) for block, shape in zip(self.blocks, shapes, strict=True))
        return Allocation(blocks, 1 - kept / total)

    def lines(self) -> list[str]:
        """What blocks keep, a line for each number that is not the same in all of them."""
        counts = [asdict(block.shape) for block in self.blocks]
        paths = dict.fromkeys(path for block in self.blocks for path in block.shares)
        told = {f"{name} by block": [str(count[name]) for count in counts] for name in counts[0]}
        told |= {f"kept of {path} by block": [f"{block.share(path):.0%}" for block in self.blocks] for path in paths}
        return [f"{what}: {' '.join(numbers)}" for what, numbers in told.items() if len(set(numbers)) > 1]

    def to_dict(self) -> dict[str, Any]:
        """The allocation as plain data."""
        blocks = [
            asdict(block.shape) | ({"shares": dict(block.shares)} if block.shares else {}) for block in self.blocks
        ]
        return {"sparsity": self.sparsity, **({"saves": self.saves} if self.saves else {}), "blocks": blocks}

    def to_json(self) -> str:
        """The allocation as JSON that `from_json` reads."""
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
        """The allocation that `to_dict` wrote; InputError when the data are something else."""
        try:
            blocks = []
            for entry in data["blocks"]:
                shares = {str(path): float(share) for path, share in entry.get("shares", {}).items()}
                shape = BlockShape(**{name: count for name, count in entry.items() if name != "shares"})
                if not all(isinstance(number, int) for number in asdict(shape).values()):
                    raise TypeError(f"the shape {shown(entry)} must be whole numbers")
                blocks.append(BlockAllocation(shape, shares))
            return cls(tuple(blocks), float(data["sparsity"]), str(data.get("saves", "")))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{NO_ALLOCATION}: {one_line(error)}") from error


def everything(decoder: Decoder) -> Allocation:
    """The allocation that keeps all of every block."""
    return Allocation(tuple(BlockAllocation(shape) for shape in decoder.shapes()), 0.0)


def uniform(decoder: Decoder, sparsity: float, units: str, width_multiple: int) -> Allocation:
    """The same share from every block, for a sparsity over all linear weights of the decoder blocks.

    What is not pruned makes the pruned units take a larger share: with units 'all', the ratio of MLP units and of
    value dimensions is sparsity / (1 - share of Q and K) (FASP). Value dimensions and KV heads are rounded first,
    then the MLP widths are chosen to meet the budget as nearly as a multiple of `width_multiple` can. Value dimensions
    are multiples of it too, since attention has fast kernels for multiples of 8, in heads of at least STEPS of them.
    Units 'blocks' remove whole sub-blocks, which is not for every block: everything is kept here (see depth.py).
    """
    shapes, total = decoder.shapes(), decoder.linear_weights()
    if units == "blocks":
        return everything(decoder)
    if units == "weights":
        return Allocation.of(
            decoder,
            (
                BlockAllocation(shape, dict.fromkeys(decoder.paths(index), 1 - sparsity))
                for index, shape in enumerate(shapes)
            ),
        )
    fields = NARROWED[units]
    hold = _check_reach(decoder, sparsity, units)
    held, budget = sum(hold.values()), sparsity * total
    kept = list(shapes)
    for name in fields:
        if name == "mlp_width":
            removed = total - sum(map(decoder.weights_of, kept))
            kept = [_narrower(shape, name, (budget - removed) / hold[name], width_multiple) for shape in kept]
        else:
            steps = [_step(shape, name, width_multiple) for shape in kept]
            kept = [_narrower(shape, name, budget / held, step) for shape, step in zip(kept, steps, strict=True)]
    if tuple(kept) == shapes:
        counts = asdict(shapes[0])[fields[-1]]
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing with a width multiple of {width_multiple}: a block has "
            f"{fields[-1]} {counts}; ask for more, or lower --width-multiple"
        )
    return Allocation.of(decoder, map(BlockAllocation, kept))


def _check_reach(decoder: Decoder, sparsity: float, units: str) -> dict[str, int]:
    """The linear weights that the units hold, by the field that counts them; InputError when those are too few."""
    shapes, total = decoder.shapes(), decoder.linear_weights()
    hold = {name: sum(_weights_in(decoder, shape, name) for shape in shapes) for name in NARROWED[units]}
    if sparsity * total >= sum(hold.values()):
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units!r}: they hold only "
            f"{sum(hold.values()) / total:.1%} of the decoder's linear weights; ask for less"
            + ("" if units == "all" else ", or use --units all")
        )
    return hold


def _step(shape: BlockShape, name: str, width_multiple: int) -> int:
    """What the count of value dimensions or KV heads is a multiple of."""
    coarse = name == "value_dim" and shape.value_dim % width_multiple == 0
    return width_multiple if coarse and shape.value_dim >= STEPS * width_multiple else 1


def _weights_in(decoder: Decoder, shape: BlockShape, name: str) -> int:
    """The linear weights that go when a field of the shape goes to zero."""
    return decoder.weights_of(shape) - decoder.weights_of(_with(shape, name, 0))


def _narrower(shape: BlockShape, name: str, ratio: float, multiple: int) -> BlockShape:
    """The shape with a share `ratio` of a field removed, rounded to a multiple; at least one multiple stays."""
    there = asdict(shape)[name]
    kept = min(there, max(1, round(there * (1 - ratio) / multiple)) * multiple)
    return _with(shape, name, there if kept > there - there % multiple else kept)


def _with(shape: BlockShape, name: str, count: int) -> BlockShape:
    return replace(shape, **{name: count})
