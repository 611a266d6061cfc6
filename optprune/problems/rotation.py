"""Rotations of a layer's inputs within slots: what a unit is, is then a direction in place of a coordinate."""

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
