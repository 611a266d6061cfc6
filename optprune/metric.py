"""The output metric: the cost of an error in each output of a layer, by the model's own loss.

For one linear layer let g [out] be the gradient of a sequence's negative log-likelihood, summed over its predictions,
at the layer's output on one token. With labels drawn from the model, not taken from the text, S = E[g g^T] over the
tokens is the layer's factor of the Fisher information: 1/2 E[e^T S e] is the second-order estimate of what output
errors e cost, in nats per token, where they are independent between tokens and average to zero. Products of the
gradients of two tokens are not in S, so it is a poor estimate for errors that tokens share: on layers of SmolLM2
independent errors cost 0.53 to 1.53 times the estimate (those of V less, those of gate more), and one error on every
token 0.06 to 5.3 times.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError, NumericalError
from optprune.moments import floats
from optprune.numerics import linalg
from optprune.numerics.gram import check_average
from optprune.numerics.precision import full_precision
from optprune.numerics.tensors import all_finite


@dataclass(frozen=True, eq=False)
class OutputBasis:
    """Another basis of a layer's outputs, in which the weight is R V and the metric is simpler."""

    root: Float[Tensor, "out out"] | Float[Tensor, "out"]
    """R, or its diagonal"""
    inverse: Float[Tensor, "out out"] | Float[Tensor, "out"]
    """the inverse of R, or its diagonal"""

    def into(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return R V."""
        return _times(self.root, weight)

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the V of an R V; columns of zeros stay exactly zero."""
        return _times(self.inverse, weight)


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    rows = rows.to(weight)
    return rows @ weight if rows.ndim == 2 else rows[:, None] * weight


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """S = E[g g^T] + diag(damping) of a layer's outputs, or only the diagonal of it; an average over tokens."""

    average: Float[Tensor, "out out"] | Float[Tensor, "out"]
    """E[g g^T], symmetric positive semidefinite, or its diagonal E[g^2]"""
    damping: Float[Tensor, "out"]
    """the addend of the diagonal"""
    tokens: int
    proved: Tensor | None = field(default=None, compare=False, repr=False)
    """the average, where it was summed from gradients here, so that it needs no check"""

    @property
    def width(self) -> int:
        return self.damping.shape[0]

    @property
    def full(self) -> bool:
        """Whether outputs are coupled: S is a matrix and not only its diagonal."""
        return self.average.ndim == 2

    @property
    def diagonal(self) -> Float[Tensor, "out"]:
        """The diagonal of S."""
        return (self.average.diagonal() if self.full else self.average) + self.damping

    @property
    def matrix(self) -> Float[Tensor, "out out"]:
        """S as a matrix."""
        return self.average + torch.diag(self.damping) if self.full else torch.diag(self.diagonal)

    def apply(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return S V."""
        if not self.full:
            return self.diagonal[:, None] * change
        return torch.addcmul(self.average @ change, self.damping[:, None], change)

    @property
    def row_scale(self) -> Float[Tensor, "out"]:
        """sqrt(S_ii), where an output with (almost) no cost counts as a rounding of the costliest one."""
        return self.row_scaling.root

    @cached_property
    def row_scaling(self) -> OutputBasis:
        """The basis diag(sqrt(S_ii)), in which S has a unit diagonal."""
        scale = _floored(self.diagonal, self.average.dtype).sqrt()
        return OutputBasis(scale, 1 / scale)

    @cached_property
    def whitening(self) -> OutputBasis:
        """The basis S^(1/2), in which the metric is the identity.

        A direction with (almost) no cost counts as a rounding of the costliest one, so that R has an inverse.
        """
        if not self.full:
            return self.row_scaling
        values, vectors = linalg.eigh(self.matrix.double())
        root = _floored(values, self.average.dtype).sqrt()
        return OutputBasis((vectors * root) @ vectors.T, (vectors / root) @ vectors.T)

    def row_scaled(self) -> "OutputMetric | None":
        """Return the metric with rows in units of 1 / sqrt(S_ii), or None where it becomes the identity."""
        if not self.full:
            return None
        unit = self.row_scale
        return self._with(self.average / torch.outer(unit, unit), self.damping / unit.square())

    def _with(self, average: Tensor, damping: Tensor) -> "OutputMetric":
        """Return the metric with another average, of the same gradients in other units or another dtype."""
        known = self.proved is self.average
        return replace(self, average=average, damping=damping, proved=average if known else None)

    def damped(self, fraction: float) -> "OutputMetric":
        """Return the same metric with the damping fraction x mean(diag E[g g^T])."""
        if not 0 <= fraction < math.inf:
            raise InputError(f"the damping fraction of a metric must be finite and not negative, not {fraction}")
        mean = (self.average.diagonal() if self.full else self.average).mean()
        return replace(self, damping=torch.full_like(self.damping, float(fraction * mean)))

    def only_diagonal(self) -> "OutputMetric":
        """Return the metric without the couplings between outputs."""
        return replace(self, average=self.average.diagonal().clone()) if self.full else self

    def check(self) -> None:
        """Raise NumericalError unless S is finite and positive semidefinite, up to rounding.

        Averages summed here need no check of definiteness; for others it costs a Cholesky factor.
        """
        if not all(map(all_finite, (self.average, self.damping))):
            raise NumericalError(
                "the output metric holds NaN or infinity: look for damaged weights, or use --dtype float32"
            )
        if bool((self.diagonal < 0).any()) or bool((self.damping < 0).any()):
            raise NumericalError("the output metric has a negative diagonal entry, so it is not one of real gradients")
        if self.full and self.proved is not self.average:
            unit, source = torch.finfo(self.average.dtype).eps, "collect it again, as the average of g g^T"
            check_average(self.average, self.average, unit, "the output metric", source)

    def merge(self, other: "OutputMetric") -> "OutputMetric":
        """Return the metric of both sets of tokens together, without damping."""
        shapes = [list(each.average.shape) for each in (self, other)]
        if shapes[0] != shapes[1]:
            raise InputError(f"metrics of shapes {shapes[0]} and {shapes[1]} cannot be merged")
        tokens = self.tokens + other.tokens
        average = torch.lerp(self.average, other.average.to(self.average), other.tokens / tokens)
        both = self.proved is self.average and other.proved is other.average
        return OutputMetric(average, torch.zeros_like(self.damping), tokens, average if both else None)

    def to(self, target: torch.dtype | torch.device) -> "OutputMetric":
        """Return the same metric in another dtype or on another device."""
        return self._with(self.average.to(target), self.damping.to(target))

    @classmethod
    def from_samples(cls, gradients: Float[Tensor, "tokens out"], *, full: bool = True) -> "OutputMetric":
        """Return the metric of a matrix of gradients g, one token per row."""
        sums = MetricSums(gradients.shape[1], gradients, full=full)
        sums.add(gradients)
        return sums.metric()


def clipped(
    gradients: Float[Tensor, "*sequences tokens out"], clip: float | None
) -> Float[Tensor, "*sequences tokens out"]:
    """Return the gradients with each token's norm limited to `clip` times the median norm of its sequence.

    Longer ones keep their direction. Tokens without a gradient do not count in the median. Without a clip all stay.
    For an expert, all its tokens in a group of sequences count as one sequence.
    """
    if clip is None or gradients.numel() == 0:  # no token of a group may be sent to an expert
        return gradients
    norms = gradients.square().sum(dim=-1, keepdim=True).sqrt()
    middle = torch.nanquantile(norms.masked_fill(norms == 0, math.nan), 0.5, dim=-2, keepdim=True)
    return gradients * (clip * middle / norms).clamp(max=1).nan_to_num(nan=1)


class MetricSums:
    """Sums of an OutputMetric over batches, in float32 or better; the sums of all layers are in memory.

    A matrix is symmetric, so half of it is stored, as in LAPACK's rectangular full packed format: with the
    outputs in two halves, the block between them, and the two triangles of the blocks on the diagonal in one square.
    """

    def __init__(self, width: int, like: Tensor, *, full: bool) -> None:
        """Create empty sums for gradients [tokens, width] that have the dtype and the device of the tensor `like`."""
        self.full, self.width, self.tokens = full, width, 0
        first = (width + 1) // 2
        like = like.new_zeros(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._sums = {"diagonal": like.new_zeros(width)}
        if full:
            self._sums["between"] = like.new_zeros(width - first, first)
            # Below the diagonal the triangle of the first half of the outputs, above it that of the second.
            self._sums["triangles"] = like.new_zeros(first, first)
        self._fetch = lambda: self._sums

    @full_precision()
    def add(self, gradients: Float[Tensor, "... out"]) -> None:
        """Add a batch of gradients g, one for each token."""
        rows = floats(gradients)
        self._sums["diagonal"].add_(rows.square().sum(0))
        if self.full:
            between, triangles = self._sums["between"], self._sums["triangles"]
            first, second = torch.split(rows, list(between.shape[::-1]), dim=1)
            between.addmm_(second.T, first)
            triangles.add_((first.T @ first).tril_(-1))
            triangles[: second.shape[1], : second.shape[1]].add_((second.T @ second).triu_(1))
        self.tokens += rows.shape[0]

    def join(self, later: "MetricSums") -> None:
        """Add the sums of tokens that come after these."""
        for part, other in zip(self._sums.values(), later._sums.values(), strict=True):
            part.add_(other)
        self.tokens += later.tokens

    def state(self) -> list[Tensor]:
        """Return all tensors of the sums, to be sent to another process."""
        count = torch.tensor([self.tokens], dtype=torch.int64, device=self._sums["diagonal"].device)
        return [count, *self._sums.values()]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Replace the sums by those of a state, of the same width and the same parts."""
        self.tokens, self._sums = int(state[0]), dict(zip(self._sums, state[1:], strict=True))

    @classmethod
    def elsewhere(cls, width: int, tokens: int, fetch: Callable[[], dict[str, Tensor]], *, full: bool) -> "MetricSums":
        """Return finished sums that are fetched on demand. No more tokens can be added."""
        sums = cls(0, torch.empty(0), full=full)
        sums.width, sums.tokens, sums._sums, sums._fetch = width, tokens, {}, fetch
        return sums

    def parts(self) -> dict[str, Tensor]:
        """Return the sums by their names: the diagonal [out], and the parts of a full matrix."""
        return self._fetch()

    def move(self, put: Callable[[dict[str, Tensor]], Callable[[], dict[str, Tensor]]]) -> None:
        """Move the sums: `put` stores them and returns a function that fetches them. No more tokens can be added."""
        self._fetch = put(self._sums)
        self._sums = {}

    def metric(self) -> OutputMetric:
        """Return the average so far, without damping."""
        if self.tokens == 0:
            raise InputError("no tokens reached this layer, so it has no output metric: give more text")
        sums = self._fetch()
        average = sums["diagonal"].clone()
        if self.full:
            average = torch.diag(average)
            between, triangles = sums["between"], sums["triangles"]
            second, first = between.shape
            average[first:, :first] = between
            average[:first, :first] += triangles.tril(-1)
            average[first:, first:] += triangles[:second, :second].triu(1).T
            average += average.tril(-1).T
        average /= self.tokens
        return OutputMetric(average, average.new_zeros(self.width), self.tokens, average)


class Metrics(Mapping[str, OutputMetric]):
    """The metrics of a model's layers by the layer's full name, each computed from its sums on access.

    The matrices of all layers together would take more memory than the model. Layers without tokens have no metric.
    """

    def __init__(self, sums: Mapping[str, MetricSums], damping: float = 0.0) -> None:
        """Create metrics with a damping, a share of each metric's mean diagonal, as in `OutputMetric.damped`."""
        self._sums, self._damping = dict(sums), damping

    def __getitem__(self, name: str) -> OutputMetric:
        if not self._sums[name].tokens:
            raise KeyError(name)
        return self._sums[name].metric().damped(self._damping)

    def __iter__(self) -> Iterator[str]:
        return (name for name, sums in self._sums.items() if sums.tokens)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def sums(self, name: str) -> MetricSums:
        """Return the sums of a layer's metric."""
        return self._sums[name]

    def damped(self, fraction: float) -> "Metrics":
        """Return the same metrics with another damping; the sums are shared."""
        return Metrics(self._sums, fraction)

    def diagonal_only(self) -> list[str]:
        """Return the layers of which only the diagonal is known."""
        return [name for name, sums in self._sums.items() if not sums.full]

    def pop_layers(self, names: Iterable[str]) -> "Metrics":
        """Remove the metrics of the given layers, as far as there are any, and return them."""
        return Metrics({name: self._sums.pop(name) for name in names if name in self._sums}, self._damping)


NOTHING = 1e-20
"""far below any cost of an output, in nats, but its root is a divisor that float32 can represent"""


def _floored(values: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return the values, raised to at least a rounding of the largest, which may itself be zero."""
    return values.clamp(min=values.max() * torch.finfo(dtype).eps).clamp(min=NOTHING)
