"""Greedy elimination of units at their exact cost, after Optimal Brain Surgeon: each removal refits the rest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import NumericalError
from optprune.numerics import linalg
from optprune.numerics.tensors import places
from optprune.problems import Channels, StructuredLeastSquares
from optprune.solvers.base import Answer, DirectSolver, check_options, measuring
from optprune.solvers.inverse import InverseForm, half_trace, unit_blocks
from optprune.work import DOUBLE, Work, factor, inverse, product, storage, sweeps

PENDING = 64
"""columns whose removals are collected before they update the whole matrices in one product"""
ROWS = 512
"""rows moved at a time in an in-place compaction"""
REMOVED = 0.3
"""the share of removed units that the plan assumes"""


@final
@dataclass(frozen=True)
class GreedyObs(DirectSolver[StructuredLeastSquares]):
    r"""Remove the cheapest `batch` units, update A^-1 and V for the rest, and repeat until `keep` are left.

    With H the inverse of A on the remaining columns and V the best weight there, a unit g of k columns costs exactly

        1/2 tr(V_g (H_gg)^-1 V_g^T);     V <- V - V_g (H_gg)^-1 H_g,   H <- H - H_:g (H_gg)^-1 H_g,

    a Schur complement of rank k. `batch` 1 is one at a time; a larger one is faster and ranks the units of a batch
    as if they were alone. No slot loses more than its share. Accepts structured problems; the start is
    not used. Not optimal: follow it with ChannelSwaps. The device is read once for every PENDING columns, to check
    that all costs were finite.

    Cost: in^3 / 3 to invert, then about out in reads for each batch and (out + in) in PENDING products for every
    PENDING columns; memory 2 in^2 + 2 out in in float64.
    Reference: OSSCAR (arXiv 2403.12983), its greedy part, reconstructed from its abstract and the released code.
    """

    accepts = (StructuredLeastSquares,)

    batch: int = 1

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return _elimination_work(outputs, inputs, REMOVED, self.batch, coupled)

    def answer(self, problem: StructuredLeastSquares, start: Tensor) -> Answer:
        form, channels = InverseForm.of(problem.loss), problem.channels
        removed = [units for units, _ in _eliminate(form, channels, [problem.pattern.keep], self.batch)]
        columns = channels.columns[torch.cat(removed)].reshape(-1) if removed else channels.columns[:0, 0]
        return Answer(form.without(columns).to(problem.loss.weight), notes=form.notes)


def removal_curve(
    problem: StructuredLeastSquares, batch: int = 1
) -> tuple[Int[Tensor, " units"], Float[Tensor, " units"], tuple[str, ...]]:
    """Return the order in which all units are removed, the refitted loss after each removal, and notes on a ridge.

    Entry i of the losses is the loss without i + 1 units.

    With several slots each loses a unit before any loses the next one, so the choice is admissible
    after every `slot_count` removals. `keep` is not used. The units of a `batch` are ranked as if they
    were alone, and choices are admissible where each slot has a multiple of `batch` left; the losses are exact.
    """
    form, channels = InverseForm.of(problem.loss), problem.channels
    size = channels.units // channels.slot_count
    targets = [left for left in range(size - 1, -1, -1) if left % batch == 0]
    steps = list(_eliminate(form, channels, targets, batch))
    rise = torch.cat([cost for _, cost in steps]).cumsum(0)
    return torch.cat([units for units, _ in steps]), problem.loss.value(form.minimiser) + rise, form.notes


def removal_curve_work(outputs: int, inputs: int, batch: int = 1, *, coupled: bool = False) -> Work:
    """Return the work of `removal_curve`, for a weight [outputs, inputs]."""
    # The matrices shrink during the elimination, so the average cost is half of the first.
    return _elimination_work(outputs, inputs, 0.5, batch, coupled)


def _elimination_work(outputs: int, inputs: int, share: float, batch: int, coupled: bool) -> Work:
    """Return the work of removing a share of the units at the cost of the first ones."""
    removed = share * inputs
    flops = measuring(outputs, inputs, coupled=coupled) + factor(inputs) + inverse(inputs)
    flops += DOUBLE * share * product(outputs, inputs, inputs)
    flops += removed * sweeps(2.2 / batch + 1.15, outputs, inputs)
    flops += removed / PENDING * sweeps(8.5, inputs, inputs + outputs)
    return Work(flops, storage(outputs, inputs, 23.0, 41.2, 27.9 if coupled else 1.2))


def _eliminate(
    form: InverseForm, channels: Channels, targets: Iterable[int], batch: int
) -> Iterator[tuple[Int[Tensor, " removed"], Float[Tensor, " removed"]]]:
    """Remove units until each slot has as many left as the target, one target after another.

    Yields the units of every batch, and the increase of the loss by each after those before it.
    """
    each = channels.columns.shape[1]
    names = torch.arange(channels.units, device=channels.columns.device)
    count = channels.slot_count
    left = torch.full((count,), channels.units // count, device=names.device)
    flat = channels.columns.reshape(-1)
    inverse, minimiser = form.inverse, form.minimiser
    if not torch.equal(flat, torch.arange(len(inverse), device=flat.device)):
        inverse, minimiser = inverse[flat[:, None], flat], minimiser[:, flat]
    work = _Remaining(inverse, minimiser, each)
    there = channels.units
    for target in targets:
        while there > target * count:
            slots = channels.slots[names]
            # The number of removed units is known without a read from the device.
            gone, few = _cheapest(work.costs(), slots, left - target, min(batch, there - target * count))
            work.record_fault(0, few)
            there -= len(gone)
            left = left.index_add(0, slots[gone], torch.ones_like(gone), alpha=-1)
            yield names[gone], work.remove(gone)
            if work.pending >= PENDING:
                work.check()
                names = names[work.stay]
                work = work.flushed()
    work.check()


def _cheapest(
    cost: Float[Tensor, " n"], slots: Int[Tensor, " n"], quota: Int[Tensor, " slots"], batch: int
) -> tuple[Int[Tensor, " removed"], Bool[Tensor, ""]]:
    """Return the `batch` cheapest units, at most the quota of each slot; removed units cost infinity.

    The quotas sum to at least a batch. The second result tells whether too few costs were finite, so that other units
    were taken.
    """
    order = cost.argsort(stable=True)
    member = (slots[order][:, None] == torch.arange(len(quota), device=order.device)).long()
    rank = (member.cumsum(0) * member).sum(1)
    refused = (rank > quota[slots[order]]) | ~(cost[order] < torch.inf)
    place = torch.arange(len(order), device=order.device) + len(order) * refused
    first = place.topk(batch, largest=False).values
    return order[first % len(order)], (first >= len(order)).any()


class _Remaining:
    """The rest of H and V during the elimination: H = inverse - L L^T and V = minimiser - C L^T, formed in part."""

    def __init__(
        self, inverse: Float[Tensor, "n n"], minimiser: Float[Tensor, "out n"], each: int, *, own: bool = False
    ) -> None:
        self.inverse, self.minimiser, self.each = inverse, minimiser, each
        self.own = own
        """whether the matrices may be overwritten"""
        width = len(inverse)
        self.lower = inverse.new_zeros(width, 0)
        """L"""
        self.coefficients = minimiser.new_zeros(len(minimiser), 0)
        """C"""
        self.alive = torch.ones(width // each, dtype=torch.bool, device=inverse.device)
        self.count = width // each
        """the number of units that are alive"""
        self.wrong = torch.zeros(2, dtype=torch.bool, device=inverse.device)
        """whether a removed unit had a cost that is not finite, and whether one repeated others; the first fault"""
        self.blocks, self.grams = unit_blocks(inverse, minimiser, each)

    @property
    def pending(self) -> int:
        return self.lower.shape[1]

    def costs(self) -> Float[Tensor, " units"]:
        """Return the cost of each unit's removal; infinity for removed units."""
        identity = torch.eye(self.each, dtype=self.blocks.dtype, device=self.blocks.device)
        blocks = torch.where(self.alive[:, None, None], self.blocks, identity)
        return torch.where(self.alive, half_trace(blocks, self.grams), torch.inf)

    @property
    def stay(self) -> Int[Tensor, " stay"]:
        """The units that are alive, ascending."""
        return places(self.alive, self.count)

    def record_fault(self, what: int, happened: Bool[Tensor, ""]) -> None:
        """Record one of the two faults, without a read from the device."""
        self.wrong[what] = happened & ~self.wrong.any() | self.wrong[what]

    def check(self) -> None:
        """Raise NumericalError where a fault was recorded."""
        nothing, repeated = linalg.numbers(*self.wrong)
        if nothing:
            raise NumericalError("the cost of removing a unit is not finite: raise the damping, e.g. to 0.01")
        if repeated:
            raise NumericalError("a unit repeats others to the last digit: raise the damping, e.g. to 0.01")

    def remove(self, units: Int[Tensor, " removed"]) -> Float[Tensor, " removed"]:
        """Remove units, in this order, and return the increase of the loss by each."""
        columns = (units[:, None] * self.each + torch.arange(self.each, device=units.device)).reshape(-1)
        part = self.inverse[:, columns] - self.lower @ self.lower[columns].T
        pivot, failed = linalg.try_cholesky(part[columns])
        self.record_fault(1, failed != 0)
        lower = linalg.solve_lower(pivot, part.T)
        right = (self.minimiser[:, columns] - self.coefficients @ self.lower[columns].T).T
        coefficients = linalg.solve_lower(pivot, right)
        # V^T C before the removal, unit by unit: with it the blocks of H and V^T V follow in place.
        cross = coefficients @ self.minimiser - (coefficients @ self.coefficients) @ self.lower.T
        ours = lower.T.reshape(len(self.alive), self.each, -1)
        theirs = cross.T.reshape(len(self.alive), self.each, -1)
        self.blocks = self.blocks - ours @ ours.transpose(1, 2)
        change = (ours @ (coefficients @ coefficients.T) / 2 - theirs) @ ours.transpose(1, 2)
        self.grams = self.grams + change + change.transpose(1, 2)
        self.lower = torch.cat([self.lower, lower.T], 1)
        self.coefficients = torch.cat([self.coefficients, coefficients.T], 1)
        self.alive[units] = False
        self.count -= len(units)
        return coefficients.square().sum(1).reshape(len(units), self.each).sum(1) / 2

    def flushed(self) -> "_Remaining":
        """Return the state with all removals carried out, in the memory of this one's matrices."""
        kept = (self.stay[:, None] * self.each + torch.arange(self.each, device=self.alive.device)).reshape(-1)
        every = torch.arange(len(self.minimiser), device=kept.device)
        lower = self.lower[kept]
        inverse = _compact(self.inverse, kept, kept, self.own).addmm_(lower, lower.T, alpha=-1)
        minimiser = _compact(self.minimiser, every, kept, self.own).addmm_(self.coefficients, lower.T, alpha=-1)
        return _Remaining(inverse, minimiser, self.each, own=True)


def _compact(
    matrix: Float[Tensor, "m n"], rows: Int[Tensor, " k"], columns: Int[Tensor, " l"], own: bool
) -> Float[Tensor, "k l"]:
    """Return rows and columns of a matrix, ascending, in the memory of the matrix if `own`."""
    if not own:
        return matrix[rows[:, None], columns]
    room = matrix.view(-1)[: len(rows) * len(columns)].view(len(rows), len(columns))
    for part in torch.split(torch.arange(len(rows), device=rows.device), ROWS):
        # No row moves towards the end, so rows that are still to be read are not overwritten.
        room[part] = matrix[rows[part][:, None], columns]
    return room
