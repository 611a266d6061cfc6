"""Rotations and permutations of a layer's inputs within slots, which leave the model's function unchanged."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import Drift, InputMoments
from optprune.numerics.tensors import as_indices, check_real
from optprune.problems.loss import LayerLoss
from optprune.problems.structured import Channels


@final
@dataclass(frozen=True, eq=False)
class Rotation:
    """x' = Q^T x with Q orthogonal: the units of each slot are mixed by one matrix, the same for all columns of a unit.

    With V' = V Q all outputs and losses stay the same, and so does the model where the layer that computes the
    inputs returns x' instead. For value dimensions the slots are KV heads, and the columns those of the query heads:
    the rotated dimensions are averaged over tokens by the same attention weights, so the two operations commute.
    """

    matrices: Float[Tensor, "slots size size"]
    """the columns are the new units, in terms of the old ones"""
    columns: Int[Tensor, "slots size tied"]
    """the columns of the weight that each slot's units stand for"""

    def __post_init__(self) -> None:
        check_real("the matrices of a rotation", self.matrices, ("slots", "size", "size"))
        slots, size, _ = self.matrices.shape
        check_real("the matrices of a rotation", self.matrices, (slots, size, size))
        columns = as_indices("the columns of a rotation", self.columns, (slots, size, "tied"))
        object.__setattr__(self, "columns", columns)

    @classmethod
    def of(cls, matrices: Float[Tensor, "slots size size"], channels: Channels) -> "Rotation":
        """Return the rotation of the units of each slot, in their order."""
        slots, size = channels.by_slot.shape
        if matrices.shape != (slots, size, size):
            raise InputError(
                f"{slots} slots of {size} units are rotated by matrices {[slots, size, size]}, not "
                f"{list(matrices.shape)}"
            )
        return cls(matrices, channels.columns[channels.by_slot])

    def to(self, device: torch.device) -> "Rotation":
        """Return the same on another device."""
        return Rotation(self.matrices.to(device), self.columns.to(device))

    def onto(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return V Q, for the rotated inputs, computed in float64 and rounded once."""
        return self._mixed(weight, self.matrices)

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return V' Q^T, for the original inputs."""
        return self._mixed(weight, self.matrices.mT)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows (or biases) that compute the inputs, rotated so that they compute the rotated inputs."""
        slots, size, _ = self.matrices.shape
        grouped = weight.double().reshape(slots, size, -1)
        return (self.matrices.double().mT @ grouped).reshape(weight.shape).to(weight.dtype)

    def moments(self, moments: InputMoments) -> InputMoments:
        """Return the moments of the rotated inputs."""
        covariance = self._congruent(moments.covariance)
        covariance = (covariance + covariance.T) / 2
        drift = moments.drift
        if drift is not None:
            square = self._congruent(drift.covariance)
            drift = Drift(self._congruent(drift.cross), (square + square.T) / 2, self._vector(drift.mean))
        proved = covariance if moments.proved is moments.covariance else None
        return InputMoments(covariance, self._vector(moments.mean), moments.tokens, drift, proved)

    def loss(self, loss: LayerLoss) -> LayerLoss:
        """Return the loss as a function of V' = V Q. Raise InputError where the damping differs within a slot."""
        damping = loss.damping[self.columns]
        if bool((damping != damping[:, :1, :1]).any()):
            raise InputError("inputs that are rotated must be damped alike: give one damping for all of them")
        return replace(loss, weight=self.onto(loss.weight), moments=self.moments(loss.moments))

    def _mixed(self, weight: Tensor, matrices: Tensor) -> Tensor:
        mixed = weight.clone()
        part = weight[:, self.columns].double()
        mixed[:, self.columns] = torch.einsum("osit,sij->osjt", part, matrices.double()).to(weight.dtype)
        return mixed

    def _congruent(self, matrix: Tensor) -> Tensor:
        """Return Q^T M Q."""
        return self.onto(self.onto(matrix).T).T

    def _vector(self, vector: Tensor) -> Tensor:
        return self.onto(vector[None])[0]


@final
@dataclass(frozen=True, eq=False)
class Permutation:
    """x'_j = x_p(j): the units of each slot in another order, the same for all columns of a unit.

    With V'_ij = V_ip(j) all outputs and losses stay the same, and so does the model where the rows of the layers
    that compute the inputs are permuted too. MLP units are one slot. For value dimensions the slots are KV heads, and
    the columns those of the query heads, which read the same rows. An N:M pattern depends on the order.
    """

    units: Int[Tensor, " units"]
    """the old index of the unit at each new index"""
    inputs: Int[Tensor, " in"]
    """the old index of the column of the weight at each new index"""

    def __post_init__(self) -> None:
        for field, what in (("units", "the order of units"), ("inputs", "the order of inputs")):
            order = as_indices(what, getattr(self, field), (field,))
            if int(order.min()) < 0 or int(order.max()) >= len(order):
                raise InputError(f"{what} must hold the numbers from 0 to {len(order) - 1}, each once")
            object.__setattr__(self, field, order)

    @classmethod
    def of(cls, units: Int[Tensor, " units"], channels: Channels, width: int) -> "Permutation":
        """Return the permutation of a weight with `width` columns by an order of units that keeps each in its slot."""
        slots = channels.slots
        units = as_indices("the order of units", units, ("units",), slots)
        every = torch.arange(channels.units, device=slots.device)
        if units.shape != every.shape or not torch.equal(units.sort().values, every):
            raise InputError(
                f"an order of {channels.units} units must contain each of them once, not {units.numel()} other numbers"
            )
        if not torch.equal(slots[units], slots):
            moved = int((slots[units] != slots).nonzero()[0, 0])
            raise InputError(
                f"a unit must stay in its slot, but unit {int(units[moved])} moves to position {moved} of another"
            )
        inputs = torch.arange(width, device=slots.device)
        inputs[channels.columns] = channels.columns[units]
        return cls(units, inputs)

    def to(self, device: torch.device) -> "Permutation":
        """Return the same on another device."""
        return Permutation(self.units.to(device), self.inputs.to(device))

    def onto(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return V', for the permuted inputs."""
        return weight[:, self.inputs]

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the V of a V', for the original inputs."""
        return weight[:, self.inputs.argsort()]

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows (or biases) that compute the inputs, in the new order of units."""
        return weight.reshape(len(self.units), -1)[self.units].reshape(weight.shape)

    def moments(self, moments: InputMoments) -> InputMoments:
        """Return the moments of the permuted inputs."""
        covariance, drift = self._square(moments.covariance), moments.drift
        if drift is not None:
            drift = Drift(self._square(drift.cross), self._square(drift.covariance), drift.mean[self.inputs])
        proved = covariance if moments.proved is moments.covariance else None
        return InputMoments(covariance, moments.mean[self.inputs], moments.tokens, drift, proved)

    def loss(self, loss: LayerLoss) -> LayerLoss:
        """Return the loss as a function of V'."""
        damping = loss.damping[self.inputs]
        return replace(loss, weight=self.onto(loss.weight), moments=self.moments(loss.moments), damping=damping)

    def _square(self, matrix: Tensor) -> Tensor:
        return matrix[self.inputs[:, None], self.inputs]
