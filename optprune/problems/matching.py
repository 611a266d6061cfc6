"""Block matching: all kept weights of a block at once, so that its output is what that of the dense block is.

Unlike the problems of a layer this one is not a quadratic, and no moments stand for its tokens: a value or a gradient
is a pass of them through the block."""

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
"""the share of zeros up to which room for them, in four vectors, takes less memory than to say where the others are"""


@final
@dataclass(frozen=True, eq=False)
class KeptEntries:
    """Entries of a parameter, which is read and written through them: of a matrix what is not zero, of a vector all.

    They are in a vector, row by row, which where few of the parameter's are gone has zeros in place of those.
    """

    weight: Tensor
    """the parameter itself, apart from autograd"""
    places: Places | None = None
    """where they are in it; None where the vector has room for all of it"""
    gone: Places | None = None
    """the zeros in such a vector, if any"""

    @classmethod
    def of(cls, parameter: Tensor) -> "KeptEntries":
        """Those of a parameter as it is now."""
        weight = parameter.detach()
        zeros = weight.numel() - int(weight.count_nonzero())
        if weight.ndim < 2 or not zeros:
            return cls(weight)
        small = weight.numel() <= torch.iinfo(torch.int32).max
        few = zeros <= FEW * weight.numel()
        found = ((weight == 0) if few else (weight != 0)).reshape(-1).nonzero().squeeze(1)
        found = found.int() if small else found
        return cls(weight, gone=found) if few else cls(weight, places=found)

    @property
    def count(self) -> int:
        """How many they are."""
        return self.room - (0 if self.gone is None else len(self.gone))

    @property
    def room(self) -> int:
        """How long their vector is."""
        return self.weight.numel() if self.places is None else len(self.places)

    def zeros(self) -> Values:
        """A vector for them."""
        return self.weight.new_zeros(self.room)

    def taken(self, tensor: Tensor) -> Values:
        """The same entries of a tensor of the parameter's shape, in its memory where there is room for all of it.

        Not yet `cleared`: the memory of a gradient may be that of others too.
        """
        flat = tensor.reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def cleared(self, values: Values) -> Values:
        """A vector with zeros in place of what is gone, put there."""
        return values if self.gone is None else values.index_fill_(0, self.gone.long(), 0.0)

    def read(self, into: Values | None = None) -> Values:
        """What the parameter has there, copied."""
        found = self.taken(self.weight)
        if into is not None:
            return into.copy_(found)
        return found.clone() if self.places is None else found

    def write(self, values: Values) -> None:
        """Let the parameter have these values there."""
        flat = self.weight.reshape(-1)
        if self.places is None:
            self.cleared(flat.copy_(values))
        else:
            flat.index_copy_(0, self.places.long(), values)
        if flat.data_ptr() != self.weight.data_ptr():  # what is not contiguous was copied to be flat
            self.weight.copy_(flat.view_as(self.weight))

    def others(self) -> int:
        """How many entries of the parameter beside these are not zero."""
        if self.places is None:
            return 0 if self.gone is None else int(self.weight.reshape(-1)[self.gone.long()].count_nonzero())
        return int(self.weight.count_nonzero()) - int(self.read().count_nonzero())


Point = tuple[Tensor, ...]
"""the kept entries of a block's parameters, a vector each, in the order of their names"""
ENOUGH = (torch.float32, torch.float64)
"""the dtypes in which a small step is not lost"""


@dataclass(frozen=True, eq=False)
class Example:
    """What a block is called with, and what it should answer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Float[Tensor, "... out"]


Terms = Callable[[Example], tuple[Tensor, ...]]


class Examples(ABC):
    """Examples that are gone through a draw at a time; other processes may have some of them."""

    draws: int
    """how many draws go through all examples once"""

    @abstractmethod
    def sums(self, terms: Terms, zeros: Callable[[], tuple[Tensor, ...]], draw: int | None = None) -> Point:
        """The sums of an example's terms over a draw, or over all examples; they begin with `zeros`.

        The draws `k draws` to `(k + 1) draws - 1` go through all examples once, in an order of their own.
        """


def order(count: int, epoch: int) -> list[int]:
    """The order in which so many examples are drawn, the `epoch`-th time that all of them are."""
    return [int(index) for index in torch.randperm(count, generator=torch.Generator().manual_seed(epoch))]


@final
@dataclass(frozen=True, eq=False)
class BlockMatching:
    """minimise  E(v) / 2 + pull / 2 * mean of ((v_i - a_i) / u_i)^2   over v, the kept entries of a block's parameters

        E(v) = sum_t w_t e_t^T S e_t / sum_t w_t y_t^T S y_t,   e_t = f(x_t; v) - y_t,   w_t = 1 / |y_t|^2

    f [tokens, out] is the block with the parameters v, x its inputs, y the dense block's outputs, a what the
    parameters begin with, S the metric of the residual stream, or the identity; u_i is the root mean square of the kept
    entries of its tensor in a. E is the relative error by token: whatever reads the residual stream divides it by the
    token's own size (RMSNorm, LayerNorm), so that an error counts by what share of its token it is, and a massive
    activation, which the first token has, by no more than any other. A mean of squares would be that token's alone.

    Zeros of matrices stay zero, since v is without them; biases and norms are free as they are. Not convex, but for a
    block that is affine in its parameters.

    The block itself holds v, so that there is no second one: a point that is measured is written into it first, and
    without one the block is measured as it is. Memory of a gradient: two of every kept entry, and what is inside the
    block during a pass there and back of one example; with a pull one more, for a.

    Reference: the whole-block matching of 3BASiL (2026), there with plain squares; the weighing of tokens is ours.
    """

    kind: ClassVar[str] = "block matching"

    module: nn.Module
    names: tuple[str, ...]
    """the parameters by their names inside the block"""
    entries: tuple[KeptEntries, ...]
    """what of them may move"""
    units: tuple[float, ...]
    """the root mean square of the kept entries of every tensor; the least of the others for a tensor of zeros"""
    examples: Examples
    metric: OutputMetric | None = None
    """S, at the block's output"""
    pull: float = 0.0
    anchor: Point | None = None
    """a, where there is a pull"""
    signal: float = field(init=False)
    """sum_t w_t y_t^T S y_t over all examples; where there is none, 1: errors are then as they are"""
    tokens: float = field(init=False)
    """the tokens of all examples"""

    def __post_init__(self) -> None:
        if bool(self.pull) != (self.anchor is not None):
            raise InputError("a pull needs the point that it is towards: make the problem by BlockMatching.of")

        # At once, and not when it is first asked for: processes that share the examples sum them up together.
        def terms(example: Example) -> Point:
            if not all_finite(example.target):
                raise NumericalError("the dense block answers NaN or infinity: look for damaged weights")
            columns = (example.target * _root_weights(example.target)).flatten(0, -2).T
            return (columns * self._weigh(columns)).sum(dtype=torch.float64), self._tokens(example)

        signal, tokens = self.examples.sums(terms, lambda: (*self._number(), *self._number()))
        object.__setattr__(self, "signal", float(signal) or 1.0)
        object.__setattr__(self, "tokens", float(tokens))

    @classmethod
    def of(
        cls, module: nn.Module, examples: Examples, metric: OutputMetric | None = None, pull: float = 0.0
    ) -> "BlockMatching":
        """The problem of a block as it is now: what is zero of its matrices stays zero.

        InputError where its parameters are in half precision, in which small steps are lost.
        """
        found = dict(module.named_parameters())
        for name, weight in found.items():
            if weight.dtype not in ENOUGH:
                raise InputError(
                    f"{name} of the block to match is a {weight.dtype}, which loses small steps: match a copy of the "
                    "block in float32, and round what it comes to"
                )
        entries = tuple(map(KeptEntries.of, found.values()))
        anchor = tuple(one.read() for one in entries) if pull else None
        return cls(module, tuple(found), entries, _units(entries), examples, metric, pull, anchor)

    def on(self, examples: Examples) -> "BlockMatching":
        """The same problem, of the same block, on other examples, such as held-out ones."""
        return replace(self, examples=examples)

    def point(self, into: Point | None = None) -> Point:
        """What the block holds now, copied, into the tensors of another point where one is given."""
        places = into or (None,) * len(self.entries)
        return tuple(one.read(place) for one, place in zip(self.entries, places, strict=True))

    def put(self, point: Point) -> None:
        """Let the block hold a point."""
        for one, values in zip(self.entries, point, strict=True):
            one.write(values)

    @torch.no_grad()
    def error(self, point: Point | None = None) -> float:
        """E, measured in float64."""
        if point is not None:
            self.put(point)

        def terms(example: Example) -> Point:
            output = first_output(self.module(*example.args, **example.kwargs))
            return (self._half(output, example)[0] * 2,)

        return float(self.examples.sums(terms, self._number)[0]) / self.signal

    def objective(self, point: Point | None = None) -> float:
        """The value to minimise."""
        return self.error(point) / 2 + self._pulled()

    def violation(self) -> float:
        """The number of entries outside the support that are not zero in the block."""
        return float(sum(one.others() for one in self.entries))

    @torch.no_grad()
    def gradient(self, point: Point | None = None, draw: int | None = None) -> tuple[float, Point]:
        """The objective and its gradient: on a draw, which estimates both, or on all."""
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
            one.cleared(slope.mul_(scale))
        if self.anchor is not None:
            for slope, one, anchor, unit in zip(sums, self.entries, self.anchor, self.units, strict=True):
                slope.add_(one.read() - anchor, alpha=self.pull / self._count / unit**2)
        return float(half) * scale + self._pulled(), tuple(sums)

    def _slopes(self, example: Example) -> tuple[Tensor, Point]:
        """Half of an example's weighed error, and its gradient."""
        slopes: list[Tensor | None] = [None] * len(self.entries)

        def leaf(number: int) -> Tensor:
            # Only what is kept of a tensor's gradient stays, from the moment that it is there.
            def pick(weight: Any) -> None:
                slopes[number], weight.grad = self.entries[number].taken(weight.grad), None

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
        """sum_t w_t e_t^T S e_t / 2, and a number with its gradient."""
        change = ((output - example.target) * _root_weights(example.target)).flatten(0, -2).T
        weighed = self._weigh(change.detach())
        # S is symmetric, so that the gradient of the half is S e at e.
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
    """1 / |y_t|; a token that answers (next to) nothing counts as the least of the others that does."""
    sizes = linalg.norm(target, -1)[..., None]
    least = torch.finfo(target.dtype).eps * sizes.max()
    return 1 / torch.where(least > 0, sizes.clamp(min=least), 1.0)
