"""Allocators without measurements: uniform shares, a given allocation, and the dense model."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

from optprune.allocation.allocation import Allocation, everything
from optprune.allocation.base import Allocator, DenseModel, Division
from optprune.errors import InputError
from optprune.models import BlockAllocation, BlockShape, Decoder, LinkedUnits, Mlp, Units
from optprune.system.wording import counted
from optprune.work import Work

NOTHING = "the sparsity is 0: nothing is removed, and no layer is solved"


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Allocator of the same share in every block."""

    units: Units
    sparsity: float
    width_multiple: int | None

    def check(self, decoder: Decoder) -> None:
        self.allocation(decoder)

    def divide(self, dense: DenseModel) -> Division:
        return Division(self.allocation(dense.decoder))

    def allocation(self, decoder: Decoder) -> Allocation:
        """Return the allocation, for which shapes are enough."""
        return uniform(decoder, self.sparsity, self.units, self.width_multiple)

    def step(self, shapes: Decoder) -> float:
        # All blocks are rounded alike, by half a step at most.
        if self.units.experts:
            removed = removed_by_experts(shapes, self.units.least_experts(shapes)).values()
            return 0.5 * shapes.linear_weights() * max((more - less for more, less in pairwise(removed)), default=0.0)
        if not self.units.kinds:
            return 1.0
        last = self.units.kinds[-1]
        return 0.5 * sum(
            last.multiple(shape, self.width_multiple, alike=True) * _weights_of_one(shapes, shape, last)
            for shape in shapes.shapes()
            if last.there(shape)
        )

    def work(self, shapes: Decoder, tokens: int) -> Work:
        return Work()


@final
@dataclass(frozen=True)
class Given(Allocator):
    """Allocator that returns a given allocation."""

    units: Units
    allocation: Allocation

    def check(self, decoder: Decoder) -> None:
        self.allocation.check(decoder)
        for index, block in enumerate(self.allocation.blocks):
            self.units.check(decoder, index, block)

    def divide(self, dense: DenseModel) -> Division:
        # The sparsity that a file states is not used: the file may have been edited.
        return Division(Allocation.of(dense.decoder, self.allocation.blocks, self.allocation.saves))

    def work(self, shapes: Decoder, tokens: int) -> Work:
        return Work()


@final
@dataclass(frozen=True)
class Dense(Allocator):
    """Allocator that keeps everything."""

    def check(self, decoder: Decoder) -> None:
        pass

    def divide(self, dense: DenseModel) -> Division:
        return Division(everything(dense.decoder), notes=(NOTHING,))

    def work(self, shapes: Decoder, tokens: int) -> Work:
        return Work()


def uniform(decoder: Decoder, sparsity: float, units: Units, width_multiple: int | None) -> Allocation:
    """Return the same share for every block, for a sparsity over all linear weights of the decoder blocks.

    Since some layers are not pruned, the pruned units lose a larger share: with units 'all', the ratio of MLP units and
    of value dimensions is sparsity / (1 - share of Q and K) (FASP). Value dimensions and KV heads are rounded first.
    The MLP widths then meet the budget as closely as multiples of `width_multiple` can; None leaves the multiple to the
    unit kind (`LinkedUnits.multiple`). Value dimensions are multiples of it too, except in small heads. Units 'blocks'
    remove whole sub-blocks, not shares: everything is kept here (see depth.py).
    """
    shapes, total = decoder.shapes(), decoder.linear_weights()
    if units.family is not None:
        return Allocation.of(
            decoder,
            (
                BlockAllocation(shape, dict.fromkeys(decoder.paths(index), 1 - sparsity))
                for index, shape in enumerate(shapes)
            ),
        )
    if units.experts:
        return _fewer_experts(decoder, sparsity, units)
    if not units.kinds:
        return everything(decoder)
    if units.compete:
        raise InputError(
            f"units {units.name!r} choose between heads and value dimensions by their costs, which uniform shares do "
            "not measure: set allocation to global, or units to all"
        )
    units.check_multiple(shapes, width_multiple, alike=True)
    hold = _check_reach(decoder, sparsity, units)
    held, budget = sum(hold.values()), sparsity * total
    kept = list(shapes)
    for kind in units.kinds:
        ratio = budget / held
        if kind is units.kinds[-1]:
            removed = total - sum(map(decoder.weights_of, kept))
            ratio = (budget - removed) / hold[kind]
        kept = [_narrower(shape, kind, ratio, kind.multiple(shape, width_multiple, alike=True)) for shape in kept]
    if tuple(kept) == shapes:
        last = units.kinds[-1]
        having = next((shape for shape in shapes if last.there(shape)), shapes[0])
        multiple = last.multiple(having, width_multiple, alike=True)
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing with a width multiple of {multiple}: a block has "
            f"{last.field} {last.there(having)}; raise the sparsity, or lower --width-multiple"
        )
    return Allocation.of(decoder, map(BlockAllocation, kept))


def _fewer_experts(decoder: Decoder, sparsity: float, units: Units) -> Allocation:
    """Return the number of experts in every block that is closest to a sparsity over all linear weights."""
    least = units.least_experts(decoder)
    removed = removed_by_experts(decoder, least)
    most = max(removed)
    if sparsity > removed[least] + 0.5 * (removed[least] - removed.get(least + 1, 0.0)):
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units.name!r}: with {counted(least, 'expert')} a "
            f"block, as many as the router chooses for a token, {removed[least]:.1%} of the decoder's linear weights "
            "are removed"
        )
    count = min(removed, key=lambda kept: abs(removed[kept] - sparsity))
    if count == most:
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing: one expert of {most} in each block is "
            f"{removed[most - 1]:.1%} of the decoder's linear weights; raise the sparsity"
        )
    return Allocation.of(decoder, map(BlockAllocation, _keeping(decoder, count)))


def removed_by_experts(decoder: Decoder, least: int) -> dict[int, float]:
    """Return the share of the decoder's linear weights that is removed, by the number of experts kept."""
    most, total = max(shape.experts for shape in decoder.shapes()), decoder.linear_weights()
    counts = range(least, most + 1)
    return {count: 1 - sum(map(decoder.weights_of, _keeping(decoder, count))) / total for count in counts}


def _keeping(decoder: Decoder, count: int) -> list[BlockShape]:
    return [replace(shape, experts=min(count, shape.experts)) for shape in decoder.shapes()]


def _check_reach(decoder: Decoder, sparsity: float, units: Units) -> dict[LinkedUnits, int]:
    """Return the linear weights that the units hold, by unit kind; InputError where they are too few."""
    shapes, total = decoder.shapes(), decoder.linear_weights()
    hold = {kind: sum(_weights_in(decoder, shape, kind) for shape in shapes) for kind in units.kinds}
    if sparsity * total >= sum(hold.values()):
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units.name!r}: they hold only "
            f"{sum(hold.values()) / total:.1%} of the decoder's linear weights{_unpruned_expert(decoder, units)}; "
            f"lower the sparsity{'' if units.name == 'all' else ', or use --units all'}"
        )
    return hold


def _unpruned_expert(decoder: Decoder, units: Units) -> str:
    """Return in words that the shared expert is never pruned, if there is one."""
    mixture = decoder.architecture.mixture
    stays = mixture is not None and mixture.shared and Mlp() in units.kinds
    return " (the expert that every token goes through stays as it is)" if stays else ""


def _weights_in(decoder: Decoder, shape: BlockShape, kind: LinkedUnits) -> int:
    """Return the linear weights that the units hold, without others of the sub-block."""
    return _weights_of_one(decoder, shape, kind) * kind.there(shape)


def _weights_of_one(decoder: Decoder, shape: BlockShape, kind: LinkedUnits) -> int:
    """Return the linear weights that one more unit would hold."""
    return decoder.weights_of(kind.with_count(shape, kind.there(shape) + 1)) - decoder.weights_of(shape)


def _narrower(shape: BlockShape, kind: LinkedUnits, ratio: float, multiple: int) -> BlockShape:
    """Return the shape without a share `ratio` of its units, rounded to a multiple; at least one multiple stays."""
    there = kind.there(shape)
    kept = min(there, max(1, round(there * (1 - ratio) / multiple)) * multiple)
    return kind.with_count(shape, there if kept > there - there % multiple else kept)
