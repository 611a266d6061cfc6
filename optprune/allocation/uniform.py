"""The uniform allocator: the same share from every block."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from optprune.allocation.allocation import Allocation, everything
from optprune.allocation.base import Allocator, DenseModel, Division
from optprune.errors import InputError
from optprune.models import BlockAllocation, BlockShape, Decoder, Experts, LinkedUnits, Mlp, Units, Weights
from optprune.system.wording import counted


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """The same share from every block."""

    units: Units
    sparsity: float
    width_multiple: int | None

    def check(self, decoder: Decoder) -> None:
        self.allocation(decoder)

    def divide(self, dense: DenseModel) -> Division:
        return Division(self.allocation(dense.decoder))

    def allocation(self, decoder: Decoder) -> Allocation:
        """What every block keeps; shapes are enough."""
        return uniform(decoder, self.sparsity, self.units, self.width_multiple)


def uniform(decoder: Decoder, sparsity: float, units: Units, width_multiple: int | None) -> Allocation:
    """The same share from every block, for a sparsity over all linear weights of the decoder blocks.

    What is not pruned makes the pruned units take a larger share: with units 'all', the ratio of MLP units and of
    value dimensions is sparsity / (1 - share of Q and K) (FASP). Value dimensions and KV heads are rounded first,
    then the MLP widths are chosen to meet the budget as nearly as a multiple of `width_multiple` can; None leaves that
    to the kind of units (`LinkedUnits.multiple`). Value dimensions are multiples of it too, since attention has fast
    kernels for multiples of 8, but in small heads.
    Units 'blocks' remove whole sub-blocks, which is not for every block: everything is kept here (see depth.py).
    """
    shapes, total = decoder.shapes(), decoder.linear_weights()
    if isinstance(units, Weights):
        return Allocation.of(
            decoder,
            (
                BlockAllocation(shape, dict.fromkeys(decoder.paths(index), 1 - sparsity))
                for index, shape in enumerate(shapes)
            ),
        )
    if isinstance(units, Experts):
        return _fewer_experts(decoder, sparsity, units)
    if not units.kinds:
        return everything(decoder)
    if units.compete:
        raise InputError(
            f"of units {units.name!r} a block loses heads or value dimensions, by what they cost, which uniform shares "
            "do not ask: set allocation to global, or units to all"
        )
    check_multiple(units, shapes, width_multiple, alike=True)
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
        multiple = last.multiple(shapes[0], width_multiple, alike=True)
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing with a width multiple of {multiple}: a block has "
            f"{last.field} {last.there(shapes[0])}; ask for more, or lower --width-multiple"
        )
    return Allocation.of(decoder, map(BlockAllocation, kept))


def check_multiple(units: Units, shapes: Sequence[BlockShape], asked: int | None, *, alike: bool) -> None:
    """Raise InputError where multiples are asked for and no count of these units would be one."""
    if asked is None or any(not kind.multiple(shape, asked, alike) % asked for kind in units.kinds for shape in shapes):
        return
    counts = sorted({kind.there(shape) for kind in units.kinds for shape in shapes})
    there = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    raise InputError(
        f"a width multiple of {asked} does nothing with units {units.name!r}, of which a block has {there}: leave out "
        "--width-multiple, or give a smaller one"
    )


def _fewer_experts(decoder: Decoder, sparsity: float, units: Experts) -> Allocation:
    """As many experts in every block as come nearest to a sparsity over all linear weights; shapes are enough."""
    least = units.least(decoder)
    gone = gone_by_experts(decoder, least)
    most = max(gone)
    if sparsity > gone[least] + 0.5 * (gone[least] - gone.get(least + 1, 0.0)):
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units.name!r}: with {counted(least, 'expert')} a "
            f"block, as many as the router chooses for a token, {gone[least]:.1%} of the decoder's linear weights are "
            "gone"
        )
    count = min(gone, key=lambda kept: abs(gone[kept] - sparsity))
    if count == most:
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing: one expert of {most} in each block is "
            f"{gone[most - 1]:.1%} of the decoder's linear weights; ask for more"
        )
    return Allocation.of(decoder, map(BlockAllocation, _keeping(decoder, count)))


def gone_by_experts(decoder: Decoder, least: int) -> dict[int, float]:
    """The share of the decoder's linear weights that is gone with so many experts in every block, from `least` on."""
    most, total = max(shape.experts for shape in decoder.shapes()), decoder.linear_weights()
    counts = range(least, most + 1)
    return {count: 1 - sum(map(decoder.weights_of, _keeping(decoder, count))) / total for count in counts}


def _keeping(decoder: Decoder, count: int) -> list[BlockShape]:
    return [replace(shape, experts=min(count, shape.experts)) for shape in decoder.shapes()]


def _check_reach(decoder: Decoder, sparsity: float, units: Units) -> dict[LinkedUnits, int]:
    """The linear weights that the units hold, by their kind; InputError when those are too few."""
    shapes, total = decoder.shapes(), decoder.linear_weights()
    hold = {kind: sum(_weights_in(decoder, shape, kind) for shape in shapes) for kind in units.kinds}
    if sparsity * total >= sum(hold.values()):
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units.name!r}: they hold only "
            f"{sum(hold.values()) / total:.1%} of the decoder's linear weights{_besides(decoder, units)}; ask for less"
            + ("" if units.name == "all" else ", or use --units all")
        )
    return hold


def _besides(decoder: Decoder, units: Units) -> str:
    """What of the MLPs stays where their units go, in words."""
    mixture = decoder.architecture.mixture
    stays = mixture is not None and mixture.shared and any(isinstance(kind, Mlp) for kind in units.kinds)
    return " (the expert that every token goes through stays as it is)" if stays else ""


def _weights_in(decoder: Decoder, shape: BlockShape, kind: LinkedUnits) -> int:
    """The linear weights that go with the units, without what else a sub-block holds."""
    there = kind.there(shape)
    one = decoder.weights_of(kind.with_count(shape, there + 1)) - decoder.weights_of(shape)
    return one * there


def _narrower(shape: BlockShape, kind: LinkedUnits, ratio: float, multiple: int) -> BlockShape:
    """The shape with a share `ratio` of its units removed, rounded to a multiple; at least one multiple stays."""
    there = kind.there(shape)
    kept = min(there, max(1, round(there * (1 - ratio) / multiple)) * multiple)
    return kind.with_count(shape, there if kept > there - there % multiple else kept)
