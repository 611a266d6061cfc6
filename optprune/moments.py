"""Sufficient statistics of a layer's inputs: all that a pruning problem needs of the calibration text.

For one linear layer let x be its input in the dense model, x* the input it will really get, and d = x* - x. The
covariances of x* and d and their means determine the loss of every candidate weight exactly, and their size does not
grow with the number of tokens. They are stored centred, and d separately: in float32 a mean that is large next to the
deviations, or an x that is large next to d, would leave no digits of them. See the package docstring for the
conventions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError, NumericalError, check_count
from optprune.numerics import gram, linalg
from optprune.numerics.gram import ACCUMULATED, check_average, clear_small
from optprune.numerics.precision import full_precision
from optprune.numerics.tensors import FLOATS, all_finite, check_floats, check_tensor

COMPARED = 256
"""inputs whose directions are counted: eigenvalues of a larger matrix cost more than they tell"""


def _check_averages(of: str, mean: Tensor, squares: Mapping[str, Tensor]) -> None:
    """Raise InputError unless a mean and averages of products are of one width, one dtype and one device."""
    check_floats(f"the mean of {of}", mean, ("in",))
    for what, average in squares.items():
        check_floats(f"the {what} of {of}, whose mean is [{len(mean)}],", average, (len(mean), len(mean)), mean)


@dataclass(frozen=True, eq=False)
class DenseMoments:
    """Averages over tokens of the dense inputs x and of their products with the layer's real inputs x*."""

    cross: Float[Tensor, "in in"]
    """E[x x*^T]"""
    gram: Float[Tensor, "in in"]
    """E[x x^T]"""
    mean: Float[Tensor, "in"]
    """E[x]"""

    def __post_init__(self) -> None:
        _check_averages("the dense inputs", self.mean, {"Gram matrix": self.gram, "products with x*": self.cross})


@dataclass(frozen=True, eq=False)
class Drift:
    """The moments of the difference d = x* - x between the layer's real inputs x* and the dense inputs x."""

    cross: Float[Tensor, "in in"]
    """Cov(d, x*) = E[d x*^T] - E[d] E[x*]^T"""
    covariance: Float[Tensor, "in in"]
    """Cov(d)"""
    mean: Float[Tensor, "in"]
    """E[d]"""

    def __post_init__(self) -> None:
        _check_averages("the drift", self.mean, {"covariance": self.covariance, "covariance with x*": self.cross})


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Averages over calibration tokens of a layer's input x* [in], and of its relation to the dense input x.

    `drift` is None when x* = x, the plain case in which the target of the layer is W x*.
    """

    covariance: Float[Tensor, "in in"]
    """Cov(x*), averaged over the tokens: symmetric positive semidefinite"""
    mean: Float[Tensor, "in"]
    """E[x*]"""
    tokens: int
    drift: Drift | None = None
    proved: Tensor | None = field(default=None, compare=False, repr=False)
    """the covariance, where it was summed from tokens here, so that it needs no check"""

    def __post_init__(self) -> None:
        _check_averages("the inputs", self.mean, {"covariance": self.covariance})
        if self.drift is not None:
            check_floats("the mean of the drift", self.drift.mean, self.mean.shape, self.mean)
        check_count("the number of tokens", self.tokens)

    @classmethod
    def from_averages(
        cls,
        gram: Float[Tensor, "in in"],
        mean: Float[Tensor, "in"],
        tokens: int,
        dense: DenseMoments | None = None,
    ) -> "InputMoments":
        """Return the moments of uncentred averages: E[x* x*^T], E[x*], and those of the dense inputs in `dense`.

        Raises NumericalError where the square of a mean is above the mean square by more than rounding.
        """
        _check_averages("the inputs", mean, {"Gram matrix": gram})
        drift = None
        if dense is not None:
            check_floats("the mean of the dense inputs", dense.mean, mean.shape, mean)
            lag, apart = gram - dense.cross, mean - dense.mean
            square = lag - dense.cross.T + dense.gram
            drift = Drift(torch.addr(lag, apart, mean, alpha=-1), torch.addr(square, apart, apart, alpha=-1), apart)
        covariance = torch.addr(gram, mean, mean, alpha=-1)
        # The variance of a constant input is zero; its rounding must not be negative.
        diagonal = covariance.diagonal()
        rounding = 3 * (ACCUMULATED + torch.finfo(gram.dtype).eps)
        below = diagonal < -rounding * (gram.diagonal() + mean.square())
        if bool((below & (gram.diagonal() >= 0)).any()):
            raise NumericalError(
                "the square of an input's mean is above its mean square, which is on the diagonal of the Gram matrix: "
                "give averages over the same tokens, and divide both sums by their number"
            )
        diagonal.copy_(torch.where(gram.diagonal() >= 0, diagonal.clamp(min=0), diagonal))
        return cls(covariance, mean, tokens, drift).clear_tiny()

    @property
    def gram(self) -> Float[Tensor, "in in"]:
        """E[x* x*^T], formed anew."""
        return torch.addr(self.covariance, self.mean, self.mean)

    @property
    def mean_square(self) -> Float[Tensor, "in"]:
        """E[x*_j^2], the diagonal of the Gram matrix."""
        return self.covariance.diagonal() + self.mean.square()

    @property
    def dense(self) -> DenseMoments | None:
        """The dense inputs' averages without centring, formed anew, with the rounding of their size."""
        drift = self.drift
        if drift is None:
            return None
        lag = torch.addr(drift.cross, drift.mean, self.mean)
        square = torch.addr(drift.covariance, drift.mean, drift.mean)
        cross = self.gram - lag
        return DenseMoments(cross, cross - lag.T + square, self.mean - drift.mean)

    @property
    def width(self) -> int:
        return self.covariance.shape[0]

    @property
    def dead(self) -> Tensor:
        """The inputs that were zero, or too small to be kept (`clear_tiny`), on every token: [in], bool."""
        return self.mean_square == 0

    def directions(self, most: int = COMPARED) -> tuple[int, int]:
        """Return in how many directions some inputs vary over the tokens, and the number of these inputs.

        They are `most` of the inputs that are not dead, spread evenly, or all of them. The directions are the numerical
        rank of their Gram matrix with a unit diagonal: its eigenvalues above the rounding of its sums in float32, so
        tokens that repeat count once, and a few large inputs hide no others. The participation ratio tr(A)^2 / tr(A^2)
        would not tell real text from repeated text, because large eigenvalues alone decide it.
        """
        live = (~self.dead).nonzero().flatten()
        count = min(most, len(live))
        if not count:
            return 0, 0
        some = live[torch.arange(count, device=live.device) * len(live) // count]
        # On the host, because the eigenvalues of a small matrix take a GPU longer.
        mean, covariance = (part.double().cpu() for part in (self.mean[some], self.covariance[some][:, some]))
        whole = torch.addr(covariance, mean, mean)
        scale = whole.diagonal().rsqrt()
        eigenvalues = linalg.eigvalsh(whole * scale * scale[:, None])
        return int((eigenvalues > count * torch.finfo(torch.float32).eps).sum()), count

    @cached_property
    def decompositions(self) -> "dict[bool, tuple[Tensor, Tensor, Tensor]]":
        """A cache of solvers for the next layer with the same inputs, as q, k and v have.

        The key is whether a bias is fitted; values are the damping, and eigenvalues and eigenvectors of the scaled Gram
        matrix.
        """
        return {}

    def parts(self) -> tuple[Tensor, ...]:
        """Return the tensors, in the order of the fields."""
        drift = () if self.drift is None else (self.drift.cross, self.drift.covariance, self.drift.mean)
        return (self.covariance, self.mean, *drift)

    def check(self) -> None:
        """Raise NumericalError unless every average is finite and the covariances are positive semidefinite.

        Averages summed here need no check of definiteness; for others it costs a Cholesky factor, once.
        """
        if not all(map(all_finite, self.parts())):
            raise NumericalError(
                "the input moments hold NaN or infinity: look for NaN weights or an overflow of the activations "
                "(a float16 model may need --dtype float32)"
            )
        if bool((self.mean_square < 0).any()):
            raise NumericalError("the Gram matrix has a negative diagonal entry, so it is not one of real inputs")
        if self.proved is not self.covariance:
            _ = self._real

    @cached_property
    def _real(self) -> bool:
        """True; NumericalError where the covariances are not positive semidefinite, up to rounding."""
        source = "collect it again, as averages of x x^T over the same tokens, in float32 or better"
        whole, unit = self.gram, torch.finfo(self.mean.dtype).eps
        check_average(self.covariance, whole, 3 * unit, "the Gram matrix", source)
        if self.drift is not None and self.dense is not None:
            # It may be a difference of averages, each with a rounding of its own.
            whole = whole + self.dense.gram
            check_average(self.drift.covariance, whole, 6 * unit, "the covariance of the drift x* - x", source)
        return True

    def merge(self, other: "InputMoments") -> "InputMoments":
        """Return the moments of both sets of tokens together."""
        # Of an expert that no token reaches both counts are zero.
        return self.mixed(other, other.tokens / max(1, self.tokens + other.tokens))

    def mixed(self, other: "InputMoments", share: float) -> "InputMoments":
        """Return the moments of a mixture of two texts: `share` is that of the other, and the rest is this one."""
        if (self.drift is None) != (other.drift is None):
            raise InputError("moments with and without dense inputs cannot be merged: collect both the same way")
        if self.width != other.width:
            raise InputError(f"moments of {self.width} and of {other.width} inputs cannot be merged: take one layer's")
        mixed = [torch.lerp(a, b.to(a), share) for a, b in zip(self.parts(), other.parts(), strict=True)]
        # The distance of the means of the two sets adds to the covariance.
        between, apart = share * (1 - share), other.mean.to(self.mean) - self.mean
        mixed[0].addr_(apart, apart, alpha=between)
        drift = None
        if self.drift is not None and other.drift is not None:
            drift_apart = other.drift.mean.to(self.mean) - self.drift.mean
            mixed[2].addr_(drift_apart, apart, alpha=between)
            mixed[3].addr_(drift_apart, drift_apart, alpha=between)
            drift = Drift(*mixed[2:])
        both = self.proved is self.covariance and other.proved is other.covariance
        return InputMoments(mixed[0], mixed[1], self.tokens + other.tokens, drift, mixed[0] if both else None)

    def centred(self) -> "InputMoments":
        """Return the moments of x* - E[x*] and x - E[x], those of the loss with a freely fitted bias."""
        drift, zero = self.drift, torch.zeros_like(self.mean)
        if drift is not None:
            drift = Drift(drift.cross, drift.covariance, zero)
        return InputMoments(self.covariance, zero, self.tokens, drift, self.proved)

    def clear_tiny(self) -> "InputMoments":
        """Set inputs and deviations to zero, in place, whose squares have no digits (1e-16 in float32). Return self."""
        constant = clear_small(self.covariance, self.mean)
        if self.drift is not None:
            self.drift.cross[:, constant] = 0
            self.drift.cross[clear_small(self.drift.covariance, self.drift.mean)] = 0
        return self

    def with_drift(self, share: float) -> "InputMoments":
        """Return the moments with the drift d = x* - x scaled: those for the dense inputs x* - share d."""
        drift = self.drift
        if drift is None or share == 1:
            return self
        drift = Drift(drift.cross * share, drift.covariance * share**2, drift.mean * share)
        return replace(self, drift=drift)

    def times(self, factor: float) -> "InputMoments":
        """Return the moments of the inputs times a factor."""
        drift = self.drift
        if drift is not None:
            # Multiplied twice, because the square of the factor may be too large for float32.
            drift = Drift(drift.cross * factor * factor, drift.covariance * factor * factor, drift.mean * factor)
        covariance = self.covariance * factor * factor
        proved = covariance if self.proved is self.covariance else None
        return InputMoments(covariance, self.mean * factor, self.tokens, drift, proved)

    def to(self, target: torch.dtype | torch.device) -> "InputMoments":
        """Return the same moments in another dtype or on another device."""
        covariance, mean, *others = (part.to(target) for part in self.parts())
        proved = covariance if self.proved is self.covariance else None
        return InputMoments(covariance, mean, self.tokens, Drift(*others) if others else None, proved)

    @classmethod
    def from_samples(
        cls, inputs: Float[Tensor, "tokens in"], dense: Float[Tensor, "tokens in"] | None = None
    ) -> "InputMoments":
        """Return the moments of a matrix of inputs x*, one token per row, and of the dense inputs x if they differ."""
        check_tensor("the matrix of inputs", inputs, ("tokens", "in"))
        if dense is not None:
            check_tensor("the matrix of dense inputs", dense, inputs.shape)
            check_floats("the matrix of dense inputs", floats(dense), inputs.shape, floats(inputs))
        sums = MomentSums(inputs.shape[1], inputs.device, with_dense=dense is not None)
        with torch.no_grad():
            sums.add(inputs, dense)
        return sums.moments(floats(inputs).dtype)


AT_ONCE = 2048
"""tokens whose deviations are formed at a time, so that the additional memory is small"""


class MomentSums:
    """Sums of InputMoments over batches: products in the inputs' float dtype (TF32 off), sums in float64.

    Half of a symmetric sum is stored. Products are of deviations from the mean of the first batch, so that a large mean
    does not make them large. On a GPU the deviations of bfloat16 inputs from a mean in bfloat16 are multiplied on
    tensor cores (`gram_product`).
    """

    def __init__(self, width: int, device: torch.device, *, with_dense: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._sums = [gram.packed_zeros(width, device), zeros(width)]
        if with_dense:
            self._sums += [zeros(width, width), gram.packed_zeros(width, device), zeros(width)]
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
                # The difference of two bfloat16 numbers has few digits.
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
            product = gram.gram_product(actual)
            for stripe, part in gram.packed_stripes(self._sums[0], len(product)):
                part.add_(product[stripe, stripe.start :])
        else:
            gram.add_square(self._sums[0], actual)

    def join(self, later: "MomentSums") -> None:
        """Add the sums of later tokens, converted to the origin of the deviations here, in float64."""
        if self.tokens == 0:
            self._sums, self._origins, self.tokens = later._sums, later._origins, later.tokens
            return
        if later.tokens == 0:
            return
        # Of y = x - o' the sums of (y + s)(z + t)^T are Y + (sum y) t^T + s (sum z + n t)^T, with s = o' - o.
        shifts = [new.double() - old.double() for new, old in zip(later._origins, self._origins, strict=True)]
        totals = [later._sums[place] for place in (1, 4)[: len(shifts)]]
        moved = [total + later.tokens * shift for total, shift in zip(totals, shifts, strict=True)]
        for place, total, shift, there in zip((0, 3), totals, shifts, moved, strict=False):
            self._sums[place].add_(later._sums[place])
            for stripe, part in gram.packed_stripes(self._sums[place], len(total)):
                right = slice(stripe.start, None)
                part.addr_(total[stripe], shift[right]).addr_(shift[stripe], there[right])
        if len(shifts) > 1:
            self._sums[2].add_(later._sums[2]).addr_(totals[1], shifts[0]).addr_(shifts[1], moved[0])
        for place, total in zip((1, 4), moved, strict=False):
            self._sums[place].add_(total)
        self.tokens += later.tokens

    def state(self) -> list[Tensor]:
        """Return all tensors of the sums, to be sent to another process."""
        total = self._sums[1]
        count = torch.tensor([self.tokens], dtype=torch.int64, device=total.device)
        origins = [origin.double() for origin in self._origins] or [torch.zeros_like(total)] * (len(self._sums) // 2)
        return [count, *self._sums, *(origin.clone() for origin in origins)]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Replace the sums by those of a state, of the same width and the same parts."""
        count, parts = int(state[0]), len(self._sums)
        self._sums = list(state[1 : 1 + parts])
        self._origins = list(state[1 + parts :]) if count else []
        self.tokens = count

    def moments(self, dtype: torch.dtype = torch.float32) -> InputMoments:
        """Return the averages so far, centred in float64."""
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
        return InputMoments(
            covariance, (self._origins[0] + mean).to(dtype), self.tokens, drift, covariance
        ).clear_tiny()

    def moments_or_zeros(self) -> InputMoments:
        """Return the averages so far; for an expert's layer without tokens those of zero inputs."""
        if self.tokens:
            return self.moments()
        mean = self._sums[1].float()
        square = mean.new_zeros(len(mean), len(mean))
        drift = Drift(square.clone(), square.clone(), mean.clone()) if len(self._sums) > 2 else None
        return InputMoments(square, mean, 0, drift, square)

    def _covariance(self, total: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the centred average of a packed sum of squares, exactly symmetric, with no copy of it in float64."""
        covariance = total.new_empty(len(mean), len(mean), dtype=dtype)
        for stripe, part in gram.packed_stripes(total, len(mean)):
            average, square = part / self.tokens, part[:, : len(part)]
            average[:, : len(part)] = (square + square.T).div_(2 * self.tokens)
            average.addr_(mean[stripe], mean[stripe.start :], alpha=-1)
            covariance[stripe, stripe.start :] = average
            covariance[stripe.stop :, stripe] = covariance[stripe, stripe.stop :].T
        # The variance of a constant input is zero; its rounding must not be negative.
        covariance.diagonal().clamp_(min=0)
        return covariance


def floats(inputs: Float[Tensor, "... in"]) -> Float[Tensor, "tokens in"]:
    """Return the inputs with one token per row, in float32 or better."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat if flat.dtype in FLOATS else flat.float()
