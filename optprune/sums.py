"""The sums from which moments are made: batch by batch, in partial sums where processes share the batches."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import Drift, InputMoments
from optprune.numerics import gram
from optprune.numerics.precision import full_precision

AT_ONCE = 2048
"""tokens whose deviations are formed at a time: what that takes beside the sums is small"""


class MomentSums:
    """Accumulates InputMoments over batches: products in the inputs' float dtype (TF32 off), sums in float64.

    What is multiplied are deviations from the mean of the first batch, so that no product is large because a mean is.
    On a GPU those of bfloat16 inputs from a mean in bfloat16 are multiplied on its tensor cores (`gram_product`).
    """

    def __init__(self, width: int, device: torch.device, *, with_dense: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._sums = [zeros(width, width), zeros(width)]
        if with_dense:
            self._sums += [zeros(width, width), zeros(width, width), zeros(width)]
        self._origins: list[Tensor] = []
        self._split = False
        self.tokens = 0

    @full_precision()
    def add(self, inputs: Float[Tensor, "... in"], dense: Float[Tensor, "... in"] | None = None) -> None:
        """Add a batch of inputs x*, and of the dense inputs x of the same tokens."""
        if (dense is not None) != (len(self._sums) > 2):
            raise InputError("every batch of moments must come with dense inputs, or none of them")
        self._split = gram.on_tensor_cores(inputs)
        actual, ideal = floats(inputs), None if dense is None else floats(dense)
        for first in range(0, len(actual), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            self._add(actual[part], None if ideal is None else ideal[part])

    def _add(self, actual: Float[Tensor, "tokens in"], ideal: Float[Tensor, "tokens in"] | None) -> None:
        drift = None if ideal is None else actual - ideal
        if not self._origins:
            self._origins = [sample.mean(0) for sample in (actual, drift) if sample is not None]
            if self._split:
                # The difference of two numbers with few digits has few.
                self._origins[0] = self._origins[0].bfloat16().float()
        actual = actual - self._origins[0]
        self._sums[1].add_(actual.sum(0))
        if drift is not None:
            drift -= self._origins[1]
            self._sums[2].add_(drift.T @ actual)
            gram.add_square(self._sums[3], drift)
            self._sums[4].add_(drift.sum(0))
        self.tokens += len(actual)
        if self._split:
            self._sums[0].add_(gram.gram_product(actual))
        else:
            gram.add_square(self._sums[0], actual)

    def join(self, later: "MomentSums") -> None:
        """Add the sums of tokens that come after these, moved to the deviations' origin here, in float64."""
        if self.tokens == 0:
            self._sums, self._origins, self.tokens = later._sums, later._origins, later.tokens
            return
        if later.tokens == 0:
            return
        # Of y = x - o' the sums of (y + s)(z + t)^T are Y + (sum y) t^T + s (sum z + n t)^T, with s = o' - o.
        shifts = [new.double() - old.double() for new, old in zip(later._origins, self._origins, strict=True)]
        totals = [later._sums[place] for place in (1, 4)[: len(shifts)]]
        moved = [total + later.tokens * shift for total, shift in zip(totals, shifts, strict=True)]
        pairs = [(0, 0), (1, 0), (1, 1)] if len(shifts) > 1 else [(0, 0)]
        for place, (left, right) in zip((0, 2, 3), pairs, strict=False):
            self._sums[place].add_(later._sums[place]).addr_(totals[left], shifts[right])
            self._sums[place].addr_(shifts[left], moved[right])
        for place, total in zip((1, 4), moved, strict=False):
            self._sums[place].add_(total)
        self.tokens += later.tokens

    def state(self) -> list[Tensor]:
        """All there is to the sums, to travel to another process."""
        total = self._sums[1]
        count = torch.tensor([self.tokens], dtype=torch.int64, device=total.device)
        origins = [origin.double() for origin in self._origins] or [torch.zeros_like(total)] * (len(self._sums) // 2)
        return [count, *self._sums, *(origin.clone() for origin in origins)]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Become the sums of a state, of the same width and as much with dense inputs."""
        count, parts = int(state[0]), len(self._sums)
        self._sums = list(state[1 : 1 + parts])
        self._origins = list(state[1 + parts :]) if count else []
        self.tokens = count

    def moments(self, dtype: torch.dtype = torch.float32) -> InputMoments:
        """The averages so far, centred in float64."""
        if self.tokens == 0:
            raise InputError("no calibration tokens reached this layer")
        square, total, *others = self._sums
        mean = total / self.tokens
        drift = None
        if others:
            cross, drift_square, drift_total = others
            drift_mean = drift_total / self.tokens
            drift = Drift(
                (cross / self.tokens).addr_(drift_mean, mean, alpha=-1).to(dtype),
                self._covariance(drift_square, drift_mean, dtype),
                (self._origins[1] + drift_mean).to(dtype),
            )
        covariance = self._covariance(square, mean, dtype)
        return InputMoments(covariance, (self._origins[0] + mean).to(dtype), self.tokens, drift, covariance).cleared()

    def moments_or_zeros(self, dtype: torch.dtype = torch.float32) -> InputMoments:
        """The averages so far; of a layer that no token has reached, an expert's, those of inputs that are zero."""
        if self.tokens:
            return self.moments(dtype)
        square, mean = self._sums[0].to(dtype), self._sums[1].to(dtype)
        drift = Drift(square.clone(), square.clone(), mean.clone()) if len(self._sums) > 2 else None
        return InputMoments(square, mean, 0, drift, square)

    def _covariance(self, total: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
        """The centred average of a sum of squares, exactly symmetric; one copy in float64, no more."""
        gram.mirror(total)
        covariance = (total + total.T).div_(2 * self.tokens).addr_(mean, mean, alpha=-1)
        # A constant input has variance zero; what rounding leaves of it must not be negative.
        covariance.diagonal().clamp_(min=0)
        return covariance.to(dtype)


def floats(inputs: Float[Tensor, "... in"]) -> Float[Tensor, "tokens in"]:
    """The inputs with one token a row, in float32 or better."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
