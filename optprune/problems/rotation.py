"""Changes of the basis of a layer's inputs that cost nothing: rotations and permutations within slots."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import Drift, InputMoments
from optprune.problems.loss import LayerLoss
from optprune.problems.structured import Channels


@final
@dataclass(frozen=True, eq=False)
class Rotation:
    """x' = Q^T x with Q orthogonal: each slot's units are mixed by one matrix, for all columns that a unit stands for.

    With V' = V Q every output is what it was, so is every loss, and so is the model where the layer that makes the
    inputs makes x' instead. For value dimensions the slots are KV heads, and the columns those of its query heads: what
    is mixed is what attention mixes over tokens with the same weights, so that the two commute.
    """

    matrices: Float[Tensor, "slots size size"]
    """the columns are the new units, in terms of the old ones"""
    columns: Int[Tensor, "slots size tied"]
    """the columns of the weight that each slot's units stand for"""

    @classmethod
    def of(cls, matrices: Float[Tensor, "slots size size"], channels: Channels) -> "Rotation":
        """A rotation of the units of each slot, in their order."""
        slots, size = channels.by_slot.shape
        if matrices.shape != (slots, size, size):
            raise InputError(
                f"{slots} slots of {size} units are rotated by matrices {[slots, size, size]}, not "
                f"{list(matrices.shape)}"
            )
        return cls(matrices, channels.columns[channels.by_slot])

    def to(self, device: torch.device) -> "Rotation":
        """The same on another device."""
        return Rotation(self.matrices.to(device), self.columns.to(device))

    def onto(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """V Q, for the rotated inputs; in float64, and rounded once."""
        return self._mixed(weight, self.matrices)

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """V' Q^T, for the inputs as they were."""
        return self._mixed(weight, self.matrices.mT)

    def rows(self, weight: Tensor) -> Tensor:
        """The rows (or biases) that make the inputs, slot by slot in order, so that they make the rotated ones."""
        slots, size, _ = self.matrices.shape
        grouped = weight.double().reshape(slots, size, -1)
        return (self.matrices.double().mT @ grouped).reshape(weight.shape).to(weight.dtype)

    def moments(self, moments: InputMoments) -> InputMoments:
        """The moments of the rotated inputs."""
        covariance = self._congruent(moments.covariance)
        covariance = (covariance + covariance.T) / 2
        drift = moments.drift
        if drift is not None:
            square = self._congruent(drift.covariance)
            drift = Drift(self._congruent(drift.cross), (square + square.T) / 2, self._vector(drift.mean))
        proved = covariance if moments.proved is moments.covariance else None
        return InputMoments(covariance, self._vector(moments.mean), moments.tokens, drift, proved)

    def loss(self, loss: LayerLoss) -> LayerLoss:
        """The loss of V' = V Q: the same numbers. InputError where the damping of a slot's inputs is not alike."""
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
        """Q^T M Q."""
        return self.onto(self.onto(matrix).T).T

    def _vector(self, vector: Tensor) -> Tensor:
        return self.onto(vector[None])[0]


@final
@dataclass(frozen=True, eq=False)
class Permutation:
    """x'_j = x_p(j): each slot's units stand in another order, the same for all columns that a unit stands for.

    With V'_ij = V_ip(j) every output is what it was, so is every loss, and so is the model where the rows of the layers
    that make the inputs are permuted too. MLP units are one slot. Of value dimensions the slots are KV heads, and the
    columns those of its query heads, which read the same rows. What a pattern lets stay in a row hangs on the order.
    """

    units: Int[Tensor, " units"]
    """the unit that comes to the place of each"""
    inputs: Int[Tensor, " in"]
    """the column of the weight that comes to the place of each"""

    @classmethod
    def of(cls, units: Int[Tensor, " units"], channels: Channels, width: int) -> "Permutation":
        """The order of units of a weight with `width` columns, each of which stays in its slot."""
        slots = channels.slots
        every = torch.arange(channels.units, device=slots.device)
        if units.shape != every.shape or not torch.equal(units.sort().values, every):
            raise InputError(
                f"an order of {channels.units} units names each of them once, which {list(units.shape)} numbers do not"
            )
        if not torch.equal(slots[units], slots):
            moved = int((slots[units] != slots).nonzero()[0, 0])
            raise InputError(f"units stay in their slots, but unit {int(units[moved])} comes to the place of {moved}")
        inputs = torch.arange(width, device=slots.device)
        inputs[channels.columns] = channels.columns[units]
        return cls(units, inputs)

    def to(self, device: torch.device) -> "Permutation":
        """The same on another device."""
        return Permutation(self.units.to(device), self.inputs.to(device))

    def onto(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """V', for the permuted inputs."""
        return weight[:, self.inputs]

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """V of a V', for the inputs as they were."""
        return weight[:, self.inputs.argsort()]

    def rows(self, weight: Tensor) -> Tensor:
        """The rows (or biases) that make the inputs, unit by unit in order, so that they make the permuted ones."""
        return weight.reshape(len(self.units), -1)[self.units].reshape(weight.shape)

    def moments(self, moments: InputMoments) -> InputMoments:
        """The moments of the permuted inputs."""
        covariance, drift = self._square(moments.covariance), moments.drift
        if drift is not None:
            drift = Drift(self._square(drift.cross), self._square(drift.covariance), drift.mean[self.inputs])
        proved = covariance if moments.proved is moments.covariance else None
        return InputMoments(covariance, moments.mean[self.inputs], moments.tokens, drift, proved)

    def loss(self, loss: LayerLoss) -> LayerLoss:
        """The loss of V': the same numbers."""
        damping = loss.damping[self.inputs]
        return replace(loss, weight=self.onto(loss.weight), moments=self.moments(loss.moments), damping=damping)

    def _square(self, matrix: Tensor) -> Tensor:
        return matrix[self.inputs[:, None], self.inputs]
