"""Sufficient statistics of a layer's inputs: everything a pruning problem needs to know about the calibration text.

For one linear layer let x be its input in the dense model and x* the input it will really get. The averages
E[x* x*^T], E[x x*^T], E[x x^T] and the means determine the loss of every candidate weight exactly, and their size
does not grow with the number of tokens. See the package docstring for the conventions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError, NumericalError


@dataclass(frozen=True, eq=False)
class DenseMoments:
    """How the dense inputs x go together with the inputs x* that the layer will really get (averages over tokens)."""

    cross: Float[Tensor, "in in"]
    """E[x x*^T]"""
    gram: Float[Tensor, "in in"]
    """E[x x^T]"""
    mean: Float[Tensor, "in"]
    """E[x]"""


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Averages over calibration tokens of a layer's input x* [in], and of its relation to the dense input x.

    `dense` is None when x* = x, the plain case in which the target of the layer is W x*.
    """

    gram: Float[Tensor, "in in"]
    """E[x* x*^T], the Gram matrix divided by the number of tokens: symmetric positive semidefinite"""
    mean: Float[Tensor, "in"]
    """E[x*]"""
    tokens: int
    dense: DenseMoments | None = None

    @property
    def width(self) -> int:
        return self.gram.shape[0]

    @property
    def dead(self) -> Tensor:
        """The inputs that were zero on every token: [in], bool."""
        return self.gram.diagonal() == 0

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        dense = () if self.dense is None else (self.dense.cross, self.dense.gram, self.dense.mean)
        return (self.gram, self.mean, *dense)

    def check(self) -> None:
        """Raise NumericalError unless every average is finite and no input has a negative mean square."""
        if not all(bool(torch.isfinite(part).all()) for part in self.parts()):
            raise NumericalError(
                "the input moments hold NaN or infinity: look for NaN weights or an overflow of the activations "
                "(a float16 model may need --dtype float32)"
            )
        if bool((self.gram.diagonal() < 0).any()):
            raise NumericalError("the Gram matrix has a negative diagonal entry, so it is not one of real inputs")

    def merge(self, other: "InputMoments") -> "InputMoments":
        """The moments of both sets of tokens together."""
        if (self.dense is None) != (other.dense is None):
            raise InputError("moments with and without dense inputs cannot be merged: collect both the same way")
        if self.width != other.width:
            raise InputError(f"moments of {self.width} and of {other.width} inputs cannot be merged: take one layer's")
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens
        mixed = [torch.lerp(a, b.to(a), share) for a, b in zip(self.parts(), other.parts(), strict=True)]
        dense = None if self.dense is None else DenseMoments(*mixed[2:])
        return InputMoments(mixed[0], mixed[1], tokens, dense)

    def centred(self) -> "InputMoments":
        """The moments of x* - E[x*] and x - E[x]: what is left of the loss once a bias is fitted freely."""
        zero = torch.zeros_like(self.mean)
        dense = self.dense
        if dense is not None:
            dense = DenseMoments(
                dense.cross - torch.outer(dense.mean, self.mean),
                dense.gram - torch.outer(dense.mean, dense.mean),
                zero,
            )
        gram = self.gram - torch.outer(self.mean, self.mean)
        # A constant input has variance zero; what rounding leaves of it must not be negative.
        gram.diagonal().clamp_(min=0)
        return InputMoments(gram, zero, self.tokens, dense)

    def to(self, target: torch.dtype | torch.device) -> "InputMoments":
        """The same moments in another dtype or on another device."""
        dense = None if self.dense is None else DenseMoments(*(part.to(target) for part in self.parts()[2:]))
        return replace(self, gram=self.gram.to(target), mean=self.mean.to(target), dense=dense)

    @classmethod
    def from_samples(
        cls, inputs: Float[Tensor, "tokens in"], dense: Float[Tensor, "tokens in"] | None = None
    ) -> "InputMoments":
        """The moments of a matrix of inputs x*, one token a row, and of the dense inputs x if they differ."""
        sums = MomentSums(inputs.shape[1], inputs.device, with_dense=dense is not None)
        sums.add(inputs, dense)
        return sums.moments(_rows(inputs).dtype)


class MomentSums:
    """Accumulates InputMoments over batches: products in the inputs' float dtype (TF32 off), sums in float64."""

    def __init__(self, width: int, device: torch.device, *, with_dense: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._sums = [zeros(width, width), zeros(width)]
        if with_dense:
            self._sums += [zeros(width, width), zeros(width, width), zeros(width)]
        self.tokens = 0

    def add(self, inputs: Float[Tensor, "... in"], dense: Float[Tensor, "... in"] | None = None) -> None:
        """Add a batch of inputs x*, and of the dense inputs x of the same tokens."""
        actual = _rows(inputs)
        products = [actual.T @ actual, actual.sum(0)]
        if dense is not None:
            ideal = _rows(dense)
            products += [ideal.T @ actual, ideal.T @ ideal, ideal.sum(0)]
        if len(products) != len(self._sums):
            raise InputError("every batch of moments must come with dense inputs, or none of them")
        for total, product in zip(self._sums, products, strict=True):
            total.add_(product)
        self.tokens += actual.shape[0]

    def moments(self, dtype: torch.dtype = torch.float32) -> InputMoments:
        """The averages so far."""
        if self.tokens == 0:
            raise InputError("no calibration tokens reached this layer")
        gram, mean, *others = self._sums
        dense = None
        if others:
            cross, ideal, ideal_mean = others
            dense = DenseMoments(
                (cross / self.tokens).to(dtype), self._square(ideal, dtype), (ideal_mean / self.tokens).to(dtype)
            )
        return InputMoments(self._square(gram, dtype), (mean / self.tokens).to(dtype), self.tokens, dense)

    def _square(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """The average of a sum of squares, exactly symmetric; one copy in float64, no more."""
        return (total + total.T).div_(2 * self.tokens).to(dtype)


def _rows(inputs: Tensor) -> Tensor:
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
