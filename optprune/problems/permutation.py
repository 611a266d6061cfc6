"""Permutations of a layer's inputs within slots: what makes the inputs makes them in another order, for free."""

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
