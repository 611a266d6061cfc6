"""Block matching: fit all kept weights of a block at once, so that its output matches that of the dense block.

Unlike a layer's problem this one is not a quadratic, and moments cannot replace its tokens: a value or a gradient
takes a pass of the tokens through the block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from optprune.errors import InputError, NumericalError
from optprune.metric import OutputMetric
from optprune.numerics import linalg
from optprune.numerics.tensors import all_finite, first_output

Values = Float[Tensor, " room"]
Places = Int[Tensor, " some"]
FEW = 1 / 6
"""the share of zeros up to which storing them, in four vectors, takes less memory than the indices of the others"""


@final
@dataclass(frozen=True, eq=False)
class KeptEntries:
    """The entries of a parameter that may change: the non-zeros of a matrix, all entries of a vector.

    They form a vector, row by row. Where few entries are zero the vector has all entries, with zeros at those.
    """

    weight: Tensor
    """the parameter itself, detached from autograd"""
    places: Places | None = None
    """the flat indices of the entries; None where the vector has all entries of the parameter"""
    removed: Places | None = None
    """the flat indices of the zeros in such a vector, if any"""

    @classmethod
    def of(cls, parameter: Tensor) -> "KeptEntries":
        """Return the entries of a parameter that are not zero now."""
        weight = parameter.detach()
        zeros = weight.numel() - int(weight.count_nonzero())
        if weight.ndim < 2 or not zeros:
            return cls(weight)
        small = weight.numel() <= torch.iinfo(torch.int32).max
        few = zeros <= FEW * weight.numel()
        found = ((weight == 0) if few else (weight != 0)).reshape(-1).nonzero().squeeze(1)
        found = found.int() if small else found
        return cls(weight, removed=found) if few else cls(weight, places=found)

    @property
    def count(self) -> int:
        """The number of entries that may change."""
        return self.room - (0 if self.removed is None else len(self.removed))

    @property
    def room(self) -> int:
        """The length of the vector."""
        return self.weight.numel() if self.places is None else len(self.places)

    def zeros(self) -> Values:
        """Return a vector of zeros for the entries."""
        return self.weight.new_zeros(self.room)

    def gather(self, tensor: Tensor) -> Values:
        """Return the same entries of a tensor of the parameter's shape: a view of it where the vector has all entries.

        Its removed entries are not set to zero (`clear`), because the memory of a gradient may be shared.
        """
        flat = tensor.reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def clear(self, values: Values) -> Values:
        """Set the removed entries of a vector to zero, in place, and return it."""
        return values if self.removed is None else values.index_fill_(0, self.removed.long(), 0.0)

    def read(self, into: Values | None = None) -> Values:
        """Return a copy of the parameter's entries."""
        found = self.gather(self.weight)
        if into is not None:
            return into.copy_(found)
        return found.clone() if self.places is None else found

    def write(self, values: Values) -> None:
        """Write values to the parameter's entries."""
        flat = self.weight.reshape(-1)
        if self.places is None:
            self.clear(flat.copy_(values))
        else:
            flat.index_copy_(0, self.places.long(), values)
        if flat.data_ptr() != self.weight.data_ptr():  # a parameter that is not contiguous was copied by `reshape`
            self.weight.copy_(flat.view_as(self.weight))

    def count_outside(self) -> int:
        """Return the number of non-zero entries of the parameter outside these."""
        if self.places is None:
            return 0 if self.removed is None else int(self.weight.reshape(-1)[self.removed.long()].count_nonzero())
        return int(self.weight.count_nonzero()) - int(self.read().count_nonzero())


Point = tuple[Tensor, ...]
"""the kept entries of a block's parameters, one vector each, in the order of their names"""
ENOUGH = (torch.float32, torch.float64)
"""the dtypes in which small steps are not lost to rounding"""


@dataclass(frozen=True, eq=False)
class Example:
    """The arguments of a call of a block, and its target output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Float[Tensor, "... out"]


Terms = Callable[[Example], tuple[Tensor, ...]]


class Examples(ABC):
    """Examples that are used one draw (mini-batch) at a time; other processes may hold some of them."""

    draws: int
    """the number of draws in an epoch"""

    @abstractmethod
    def sums(self, terms: Terms, zeros: Callable[[], tuple[Tensor, ...]], draw: int | None = None) -> Point:
        """Return the sums of the examples' terms over a draw, or over all examples, starting from `zeros`.

        The draws `k draws` to `(k + 1) draws - 1` are epoch k: each example once, in an order of the epoch.
        """


def order(count: int, epoch: int) -> list[int]:
    """Return the order in which `count` examples are drawn in an epoch."""
    return [int(index) for index in torch.randperm(count, generator=torch.Generator().manual_seed(epoch))]


@final
@dataclass(frozen=True, eq=False)
class BlockMatching:
    """minimise  E(v) / 2 + pull / 2 * mean of ((v_i - a_i) / u_i)^2   over v, the kept entries of a block's parameters

        E(v) = sum_t w_t e_t^T S e_t / sum_t w_t y_t^T S y_t,   e_t = f(x_t; v) - y_t,   w_t = 1 / |y_t|^2

    f [tokens, out] is the block with the parameters v, x its inputs, y the dense block's outputs, a the initial
    parameters, S the metric of the residual stream, or the identity; u_i is the root mean square of the kept
    entries of its tensor in a. E is the relative error by token: the layers that read the residual stream divide it by
    the size of the token (RMSNorm, LayerNorm), so an error counts relative to its token. A massive activation, as the
    first token has, counts no more than others; it would dominate a mean of squares.

    Zeros of matrices stay zero, since v leaves them out; biases and norms are free. Not convex, except for a
    block that is affine in its parameters.

    The block itself holds v, so no second copy exists: a point is written into the block before it is measured, and
    without a point the block is measured as it is. Memory of a gradient: two numbers per kept entry, and the
    activations of one example; with a pull one more number per entry, for a.

    Reference: the whole-block matching of 3BASiL (2026), there with plain squares; the weighing of tokens is ours.
    """

    kind: ClassVar[str] = "block matching"

    module: nn.Module
    names: tuple[str, ...]
    """the names of the parameters inside the block"""
    entries: tuple[KeptEntries, ...]
    """the entries of the parameters that may change"""
    units: tuple[float, ...]
    """the root mean square of the kept entries of every tensor; for a tensor of zeros the least of the others"""
    examples: Examples
    metric: OutputMetric | None = None
    """S, at the block's output"""
    pull: float = 0.0
    anchor: Point | None = None
    """a, where there is a pull"""
    signal: float = field(init=False)
    """sum_t w_t y_t^T S y_t over all examples, or 1 where it is zero"""
    tokens: float = field(init=False)
    """the number of tokens of all examples"""

    def __post_init__(self) -> None:
        if bool(self.pull) != (self.anchor is not None):
            raise InputError("a pull needs its anchor point: make the problem by BlockMatching.of")

        # Now, and not on first use: processes that share the examples have to sum them at the same time.
        def terms(example: Example) -> Point:
            if not all_finite(example.target):
                raise NumericalError("the dense block returns NaN or infinity: look for damaged weights")
            columns = (example.target * _root_weights(example.target)).flatten(0, -2).T
            return (columns * self._weigh(columns)).sum(dtype=torch.float64), self._tokens(example)

        signal, tokens = self.examples.sums(terms, lambda: (*self._number(), *self._number()))
        object.__setattr__(self, "signal", float(signal) or 1.0)
        object.__setattr__(self, "tokens", float(tokens))

    @classmethod
    def of(
        cls, module: nn.Module, examples: Examples, metric: OutputMetric | None = None, pull: float = 0.0
    ) -> "BlockMatching":
        """Return the problem of a block as it is now; zeros of its matrices stay zero.

        Raise InputError where its parameters are in half precision, in which small steps are lost.
        """
        found = dict(module.named_parameters())
        for name, weight in found.items():
            if weight.dtype not in ENOUGH:
                raise InputError(
                    f"{name} of the block to match is a {weight.dtype}, which loses small steps: match a copy of the "
                    "block in float32, and round the result"
                )
        entries = tuple(map(KeptEntries.of, found.values()))
        anchor = tuple(one.read() for one in entries) if pull else None
        return cls(module, tuple(found), entries, _units(entries), examples, metric, pull, anchor)

    def on(self, examples: Examples) -> "BlockMatching":
        """Return the problem of the same block on other examples, such as held-out ones."""
        return replace(self, examples=examples)

    def point(self, into: Point | None = None) -> Point:
        """Return a copy of the block's current point, in the tensors of another point where one is given."""
        places = into or (None,) * len(self.entries)
        return tuple(one.read(place) for one, place in zip(self.entries, places, strict=True))

    def put(self, point: Point) -> None:
        """Write a point into the block."""
        for one, values in zip(self.entries, point, strict=True):
            one.write(values)

    @torch.no_grad()
    def error(self, point: Point | None = None) -> float:
        """Return E, measured in float64."""
        if point is not None:
            self.put(point)

        def terms(example: Example) -> Point:
            output = first_output(self.module(*example.args, **example.kwargs))
            return (self._half(output, example)[0] * 2,)

        return float(self.examples.sums(terms, self._number)[0]) / self.signal

    def objective(self, point: Point | None = None) -> float:
        """Return the value to minimise."""
        return self.error(point) / 2 + self._pulled()

    def violation(self) -> float:
        """Return the number of non-zero entries of the block outside the support."""
        return float(sum(one.count_outside() for one in self.entries))

    @torch.no_grad()
    def gradient(self, point: Point | None = None, draw: int | None = None) -> tuple[float, Point]:
        """Return the objective and its gradient, estimated on a draw or computed on all examples."""
        if point is not None:
            self.put(point)

        def zeros() -> tuple[Tensor, ...]:
            return (*self._number(), *self._number(), *(one.zeros() for one in self.entries))

        def terms(example: Example) -> tuple[Tensor, ...]:
            half, slopes = self._slopes(example)
            return (half, self._tokens(example), *slopes)

        half, tokens, *sums = self.examples.sums(terms, zeros, draw)
        scale = self.tokens / self.signal / float(tokens)
        for slope, one in zip(sums, self.entries, strict=True):
            one.clear(slope.mul_(scale))
        if self.anchor is not None:
            for slope, one, anchor, unit in zip(sums, self.entries, self.anchor, self.units, strict=True):
                slope.add_(one.read() - anchor, alpha=self.pull / self._count / unit**2)
        return float(half) * scale + self._pulled(), tuple(sums)

    def _slopes(self, example: Example) -> tuple[Tensor, Point]:
        """Return half of an example's weighted error, and its gradient."""
        slopes: list[Tensor | None] = [None] * len(self.entries)

        def leaf(number: int) -> Tensor:
            # Only the kept entries of a gradient are stored, as soon as it is computed.
            def pick(weight: Any) -> None:
                slopes[number], weight.grad = self.entries[number].gather(weight.grad), None

            found: Any = self.entries[number].weight.detach().requires_grad_()  # torch's stubs leave hooks open
            found.register_post_accumulate_grad_hook(pick)
            return found

        leaves = [leaf(number) for number in range(len(self.names))]
        with torch.enable_grad():
            named = dict(zip(self.names, leaves, strict=True))
            output = first_output(functional_call(self.module, named, example.args, dict(example.kwargs)))
            half, product = self._half(output, example)
            torch.autograd.backward(product, inputs=leaves)
        pairs = zip(slopes, self.entries, strict=True)
        return half, tuple(one.zeros() if slope is None else slope for slope, one in pairs)

    @property
    def _count(self) -> int:
        return max(1, sum(one.count for one in self.entries))

    def _pulled(self) -> float:
        if self.anchor is None:
            return 0.0
        parts = zip(self.entries, self.anchor, self.units, strict=True)
        total = sum(float((one.read() - anchor).double().square().sum()) / unit**2 for one, anchor, unit in parts)
        return self.pull / 2 * total / self._count

    def _half(self, output: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        """Return sum_t w_t e_t^T S e_t / 2, and a scalar with the same gradient."""
        change = ((output - example.target) * _root_weights(example.target)).flatten(0, -2).T
        weighed = self._weigh(change.detach())
        # S is symmetric, so the gradient of the half is S e.
        return (change.detach() * weighed).sum(dtype=torch.float64) / 2, (change * weighed).sum()

    def _weigh(self, columns: Tensor) -> Tensor:
        return columns if self.metric is None else self.metric.apply(columns)

    def _number(self) -> Point:
        return (torch.zeros((), dtype=torch.float64, device=self.entries[0].weight.device),)

    def _tokens(self, example: Example) -> Tensor:
        count = example.target.shape[:-1].numel()
        return torch.tensor(float(count), dtype=torch.float64, device=example.target.device)


def _units(entries: Iterable[KeptEntries]) -> tuple[float, ...]:
    found = [float(one.read().double().square().sum().div(max(1, one.count)).sqrt()) for one in entries]
    least = min((unit for unit in found if unit > 0), default=1.0)
    return tuple(unit or least for unit in found)


def _root_weights(target: Float[Tensor, "... out"]) -> Float[Tensor, "... 1"]:
    """Return 1 / |y_t|, where the size of a token with (almost) no output is raised to an eps of the largest."""
    sizes = linalg.norm(target, -1)[..., None]
    least = torch.finfo(target.dtype).eps * sizes.max()
    return 1 / torch.where(least > 0, sizes.clamp(min=least), 1.0)
