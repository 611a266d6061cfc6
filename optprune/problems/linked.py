"""One choice shared by several layers: which units to keep, where a unit is a set of rows and columns that go together.

Removing column j of the second of two consecutive linear layers makes row j of the first irrelevant (FASP, arXiv
2501.09412), so the two go together and the loss is that of the second layer alone.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.patterns import SlotWise
from optprune.problems.loss import LayerLoss
from optprune.problems.selection import SelectionProblem


@final
@dataclass(frozen=True, eq=False)
class Link:
    """Unit j stands for columns[j] of the consumer and for rows[p][j] (with their biases) of each producer p.

    An MLP has one unit per hidden neuron and one slot. Attention has one unit per dimension of a KV head: its rows
    are one row of V, its columns the same dimension of every query head that reads that KV head, and its slot is
    the KV head, because every head must keep the same number of dimensions.
    """

    columns: Int[Tensor, "units columns"]
    slots: Int[Tensor, " units"]
    rows: tuple[Int[Tensor, "units _"], ...] = ()

    def __post_init__(self) -> None:
        for what, part in (("slots", self.slots), *(("rows", rows) for rows in self.rows)):
            if len(part) != self.units:
                raise InputError(f"a link of {self.units} units has {len(part)} {what}: give one for each unit")
        flat = self.columns.reshape(-1)
        if flat.unique().numel() != flat.numel():
            raise InputError("two units of a link claim the same column of the consumer")
        counts = torch.bincount(self.slots)
        if bool((counts != counts[0]).any()):
            raise InputError(f"all slots of a link must have the same number of units, not {counts.tolist()}")

    @property
    def units(self) -> int:
        return self.columns.shape[0]

    @property
    def slot_count(self) -> int:
        return int(self.slots.max()) + 1

    def column_mask(self, units: Bool[Tensor, " units"], width: int) -> Bool[Tensor, "1 in"]:
        """The consumer's columns that stay when the units of the mask stay; columns of no unit always stay."""
        mask = torch.ones(width, dtype=torch.bool, device=units.device)
        mask[self.columns[~units].reshape(-1)] = False
        return mask[None]

    def sum_columns(self, per_column: Float[Tensor, " in"]) -> Float[Tensor, " units"]:
        """Add up a score per column over the columns of each unit."""
        return per_column[self.columns].sum(1)


@final
@dataclass(frozen=True, eq=False)
class LinkedLeastSquares(SelectionProblem):
    """minimise f(V) over V and z subject to V_c = 0 for the columns c of every unit with z_j = 0,
    z in {0, 1}^units, sum over each slot of z_j = keep / slots.

    V [out, in] is the consumer's weight, `keep` the number of units to keep. Mixed-integer: not convex in z, convex
    in V once z is fixed (`restrict`). f is the consumer's LayerLoss, in (output)^2 per token; the producers only
    lose rows whose outputs nothing reads any more, so they add nothing to it.

    Reference: FASP (arXiv 2501.09412), section on the pruning structure.
    """

    kind: ClassVar[str] = "linked least squares"

    loss: LayerLoss
    link: Link
    keep: int

    def __post_init__(self) -> None:
        width = self.loss.weight.shape[1]
        first, last = int(self.link.columns.min()), int(self.link.columns.max())
        if first < 0 or last >= width:
            raise InputError(f"the link names columns {first} to {last}, but the layer has {width}: count from 0")
        if not 0 < self.keep <= self.link.units:
            raise InputError(f"cannot keep {self.keep} of {self.link.units} units: keep at least 1 and at most all")
        if self.keep % self.link.slot_count:
            raise InputError(
                f"{self.keep} units cannot be shared equally by {self.link.slot_count} slots: keep a multiple"
            )

    @property
    def pattern(self) -> SlotWise:
        return SlotWise(self.link.slots, self.keep // self.link.slot_count)

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        return self.loss.value(weight)

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """The number of units used beyond what each slot may keep."""
        used = torch.zeros(self.link.slot_count, dtype=torch.long, device=weight.device)
        used.scatter_add_(0, self.link.slots, self._used(weight).long())
        return float((used - self.pattern.keep).clamp(min=0).sum())

    def start(self) -> Float[Tensor, "out in"]:
        """W with the columns of the units of largest norm kept and the rest set to zero."""
        return self.zero_outside(self.pattern.project(self._norms(self.loss.weight)))

    def support(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, " units"]:
        """The units a weight uses, completed to `keep` by the units of largest original norm."""
        norms = self._norms(self.loss.weight)
        # By rank, not by size: next to the 1 of a used unit a small norm would be rounded away.
        order = torch.argsort(norms, descending=True, stable=True)
        ranks = torch.empty_like(norms, dtype=torch.float64)
        ranks[order] = -torch.arange(len(order), device=order.device).to(ranks)
        return self.pattern.project(ranks + len(order) * self._used(weight))

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, " units"]:
        return self.pattern.project(self.link.sum_columns(score.sum(0)))

    def mask(self, choice: Bool[Tensor, " units"]) -> Bool[Tensor, "1 in"]:
        return self.link.column_mask(choice, self.loss.weight.shape[1])

    def zero_outside(self, choice: Bool[Tensor, " units"]) -> Float[Tensor, "out in"]:
        """The original weight with the columns of all other units set to zero: pruning without restoration."""
        return self.restrict(choice).start()

    def _norms(self, weight: Tensor) -> Tensor:
        return self.link.sum_columns(weight.square().sum(0)).sqrt()

    def _used(self, weight: Tensor) -> Tensor:
        return (weight != 0).any(0)[self.link.columns].any(1)
