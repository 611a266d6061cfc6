"""Structured least squares: the choice of the groups of input channels to keep. Whole columns of the weight go."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError, check_count, check_kind
from optprune.metric import OutputBasis
from optprune.numerics import linalg
from optprune.numerics.tensors import as_indices
from optprune.patterns import SlotWise
from optprune.problems.loss import LayerLoss
from optprune.problems.masked import SelectionProblem


@final
@dataclass(frozen=True, eq=False)
class Channels:
    """Units of input channels: unit j stands for columns[j] of the weight, and every slot keeps equally many units.

    An MLP has one unit for each hidden neuron and one slot. Attention has one unit for each dimension of a KV head: its
    columns are the same dimension of every query head that reads that KV head, and its slot is the KV head, because
    every head must keep the same number of dimensions.
    """

    columns: Int[Tensor, "units columns"]
    """the columns of each unit, equally many for all; a column of no unit stays"""
    slots: Int[Tensor, " units"]
    """the slot of each unit, e.g. its KV head; all slots have equally many units"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", as_indices("the columns of units", self.columns, ("units", "columns")))
        object.__setattr__(self, "slots", as_indices("the slots of units", self.slots, ("units",), self.columns))
        if len(self.slots) != self.units:
            raise InputError(f"{self.units} units have {len(self.slots)} slots: give one for each unit")
        first, last = (int(end) for end in torch.aminmax(self.slots))
        # Before anything is counted: memory and messages are bounded by the number of units.
        if first < 0 or last >= self.units:
            wrong = first if first < 0 else last
            raise InputError(f"a slot of {self.units} units cannot be {wrong}: number them from 0, without a gap")
        flat = self.columns.reshape(-1)
        if linalg.unique(flat).numel() != flat.numel():
            raise InputError("two units claim the same column of the weight")
        counts = torch.bincount(self.slots)
        if bool((counts != counts[0]).any()):
            least, most = (int(end) for end in torch.aminmax(counts))
            raise InputError(f"all slots must have the same number of units, not {least} to {most}")

    @classmethod
    def of(cls, width: int, size: int = 1, device: torch.device | None = None) -> "Channels":
        """Return groups of `size` consecutive channels in one slot: single channels, or heads of `size` dimensions.

        They must be on the device of the weight, by default the CPU.
        """
        check_count("the number of channels", width)
        check_count("the size of a group", size)
        if width == 0 or size == 0 or width % size:
            raise InputError(
                f"{width} channels cannot be cut into groups of {size}: take a size that divides their number"
            )
        device = torch.device("cpu") if device is None else device
        columns = torch.arange(width, device=device).reshape(-1, size)
        return cls(columns, torch.zeros(width // size, dtype=torch.long, device=device))

    def to(self, device: torch.device) -> "Channels":
        """Return the same units on another device."""
        return self if device == self.slots.device else Channels(self.columns.to(device), self.slots.to(device))

    @property
    def units(self) -> int:
        return self.columns.shape[0]

    @cached_property
    def slot_count(self) -> int:
        return int(self.slots.max()) + 1

    @cached_property
    def by_slot(self) -> Int[Tensor, "slots size"]:
        """The units of every slot, in their order."""
        return self.slots.argsort(stable=True).reshape(self.slot_count, -1)

    def column_mask(self, units: Bool[Tensor, " units"], width: int) -> Bool[Tensor, "1 in"]:
        """Return the mask of the columns that stay when the units of a mask stay; columns of no unit always stay."""
        mask = torch.ones(width, dtype=torch.bool, device=units.device)
        mask[self.columns] = units[:, None]
        return mask[None]

    def first(self, keep: int) -> Bool[Tensor, " units"]:
        """Return the mask of the first `keep` units of each slot."""
        place = torch.arange(self.units, device=self.slots.device) % (self.units // self.slot_count)
        return place < keep

    def units_reading(self, inputs: Bool[Tensor, " in"]) -> Bool[Tensor, " units"]:
        """Return the units with an input in the mask, and the first others, so that all slots keep equally many.

        Every slot keeps at least one. The other units can be removed where the weights of the other inputs are zero.
        """
        read = inputs[self.columns].any(1)
        counts = torch.zeros(self.slot_count, dtype=torch.long, device=read.device)
        counts.scatter_add_(0, self.slots, read.long())
        return SlotWise(self.slots, max(int(counts.max()), 1)).project(read.double())

    def sum_columns(self, per_column: Float[Tensor, " in"]) -> Float[Tensor, " units"]:
        """Sum a score per column over the columns of each unit."""
        return per_column[self.columns].sum(1)


@final
@dataclass(frozen=True, eq=False)
class StructuredLeastSquares(SelectionProblem):
    """minimise f(V) over V and z subject to z_j = 1 or V_c = 0 for every column c of unit j (bilinear: (1 - z_j) V_c
    = 0), z in {0, 1}^units, sum over each slot of z_j = keep / slots.

    V [out, in]; `keep` is the number of units to keep. Mixed-integer: not convex in z, convex in V once z is fixed
    (`restrict`). f is the LayerLoss, in (output)^2 per token. Where a unit also stands for rows of the layers before
    this one, they only lose rows whose outputs nothing reads any more, so they add nothing to f.

    Reference: SPAP (arXiv 2505.03373), the mixed-integer model, reconstructed from its abstract; FASP (arXiv
    2501.09412), section on the pruning structure, for units of several layers.
    """

    kind: ClassVar[str] = "structured least squares"

    loss: LayerLoss
    channels: Channels
    keep: int

    def __post_init__(self) -> None:
        channels, width = self.channels, self.loss.weight.shape[1]
        check_kind("the units to choose from", channels, Channels, "give Channels")
        check_count("the number of units to keep", self.keep)
        as_indices("the columns of units", channels.columns, ("units", "columns"), self.loss.weight)
        first, last = int(channels.columns.min()), int(channels.columns.max())
        if first < 0 or last >= width:
            raise InputError(f"the units name columns {first} to {last}, but the layer has {width}: count from 0")
        if not 0 < self.keep <= channels.units:
            raise InputError(f"cannot keep {self.keep} of {channels.units} units: keep at least 1 and at most all")
        if self.keep % channels.slot_count:
            raise InputError(
                f"{self.keep} units cannot be shared equally by {channels.slot_count} slots: keep a multiple"
            )

    @cached_property
    def pattern(self) -> SlotWise:
        """The admissible choices: equally many units of every slot."""
        return SlotWise(self.channels.slots, self.keep // self.channels.slot_count)

    def in_output_basis(self) -> "tuple[StructuredLeastSquares, OutputBasis | None]":
        """Return the problem for S^(1/2) V, without a metric: the zero columns are those of V."""
        metric = self.loss.metric
        return (self, None) if metric is None else (replace(self, loss=self.loss.whitened()), metric.whitening)

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        return self.loss.value(weight)

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the number of units used beyond what each slot may keep."""
        used = torch.zeros(self.channels.slot_count, dtype=torch.long, device=weight.device)
        used.scatter_add_(0, self.channels.slots, self._used(weight).long())
        return float((used - self.pattern.keep).clamp(min=0).sum())

    def start(self) -> Float[Tensor, "out in"]:
        """Return W with the columns of the units of largest norm kept and the rest set to zero."""
        return self.zero_outside(self.pattern.project(self._norms(self.loss.weight)))

    def support(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, " units"]:
        """Return the units that a weight uses, completed to `keep` by the units of largest original norm."""
        norms = self._norms(self.loss.weight)
        # Ranks, not norms: added to the 1 of a used unit a small norm would be lost to rounding.
        order = torch.argsort(norms, descending=True, stable=True)
        ranks = torch.empty_like(norms, dtype=torch.float64)
        ranks[order] = -torch.arange(len(order), device=order.device).to(ranks)
        return self.pattern.project(ranks + len(order) * self._used(weight))

    def inputs(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, " in"]:
        """Return the inputs of the units that an answer uses."""
        return self.mask(self.support(weight))[0]

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, " units"]:
        return self.pattern.project(self.channels.sum_columns(score.sum(0)))

    def mask(self, choice: Bool[Tensor, " units"]) -> Bool[Tensor, "1 in"]:
        return self.channels.column_mask(choice, self.loss.weight.shape[1])

    def zero_outside(self, choice: Bool[Tensor, " units"]) -> Float[Tensor, "out in"]:
        """Return the original weight with the columns of all other units set to zero, without restoration."""
        return self.restrict(choice).start()

    def _norms(self, weight: Tensor) -> Tensor:
        return self.channels.sum_columns(weight.square().sum(0)).sqrt()

    def _used(self, weight: Tensor) -> Tensor:
        return (weight != 0).any(0)[self.channels.columns].any(1)
