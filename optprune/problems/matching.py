"""Block matching: all kept weights of a block at once, so that its output is what that of the dense block is.

Unlike the problems of a layer this one is not a quadratic, and no moments stand for its tokens: a value or a gradient
is a pass of them through the block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from optprune.errors import InputError, NumericalError
from optprune.metric import OutputMetric
from optprune.numerics import linalg
from optprune.numerics.finite import all_finite
from optprune.numerics.modules import first_output

Point = tuple[Tensor, ...]
"""the parameters of a block, in the order of their names"""
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
    """minimise  E(v) / 2 + pull / 2 * mean over kept weights of ((v_i - a_i) / u_i)^2   over v with the zeros of a.

        E(v) = sum_t w_t e_t^T S e_t / sum_t w_t y_t^T S y_t,   e_t = f(x_t; v) - y_t,   w_t = 1 / |y_t|^2

    f [tokens, out] is the block with the parameters v, x its inputs, y the dense block's outputs, a what the
    parameters begin with, S the metric of the residual stream, or the identity; u_i is the root mean square of the kept
    entries of its tensor in a. E is the relative error by token: whatever reads the residual stream divides it by the
    token's own size (RMSNorm, LayerNorm), so that an error counts by what share of its token it is, and a massive
    activation, which the first token has, by no more than any other. A mean of squares would be that token's alone.

    Zeros of the weights of linear layers stay zero; biases and norms are free as they are. Not convex, but for a block
    that is affine in its parameters. Memory of a gradient: two of every tensor, and what is inside the block during a
    pass there and back of one example.

    Reference: the whole-block matching of 3BASiL (2026), there with plain squares; the weighing of tokens is ours.
    """

    kind: ClassVar[str] = "block matching"

    module: nn.Module
    names: tuple[str, ...]
    """the parameters by their names inside the block"""
    anchor: Point
    """a, where it begins: the block's own parameters, which stay as they are meanwhile"""
    support: tuple[Tensor | None, ...]
    """masks of what may be other than zero; None where all may be"""
    examples: Examples
    metric: OutputMetric | None = None
    """S, at the block's output"""
    pull: float = 0.0
    signal: float = field(init=False)
    """sum_t w_t y_t^T S y_t over all examples; where there is none, 1: errors are then as they are"""
    tokens: float = field(init=False)
    """the tokens of all examples"""

    def __post_init__(self) -> None:
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
        """The problem of a block as it is now: what is zero of its linear layers stays zero.

        InputError where its parameters are in half precision, in which small steps are lost.
        """
        found = dict(module.named_parameters())
        for name, weight in found.items():
            if weight.dtype not in ENOUGH:
                raise InputError(
                    f"{name} of the block to match is a {weight.dtype}, which loses small steps: match a copy of the "
                    "block in float32, and round what it comes to"
                )
        whole: Any = module  # torch's stubs leave the type of its parts open
        parts: Iterable[tuple[str, nn.Module]] = whole.named_modules()
        linear = {f"{path}.weight".removeprefix(".") for path, part in parts if isinstance(part, nn.Linear)}
        anchor = tuple(weight.detach() for weight in found.values())
        support = tuple(weight != 0 if name in linear else None for name, weight in zip(found, anchor, strict=True))
        return cls(module, tuple(found), anchor, support, examples, metric, pull)

    def on(self, examples: Examples) -> "BlockMatching":
        """The same problem on other examples, such as held-out ones."""
        return replace(self, examples=examples)

    def start(self) -> Point:
        """A feasible point: copies of what the parameters begin with."""
        return tuple(weight.clone() for weight in self.anchor)

    @cached_property
    def units(self) -> tuple[float, ...]:
        """The root mean square of the kept entries of every tensor; the least of the others for a tensor of zeros."""
        found = [
            float(weight.double().square().sum().div(max(1, count)).sqrt())
            for weight, count in zip(self.anchor, self._counts, strict=True)
        ]
        least = min((unit for unit in found if unit > 0), default=1.0)
        return tuple(unit or least for unit in found)

    @property
    def _counts(self) -> list[int]:
        pairs = zip(self.anchor, self.support, strict=True)
        return [weight.numel() if mask is None else int(mask.sum()) for weight, mask in pairs]

    @torch.no_grad()
    def error(self, point: Point) -> float:
        """E, measured in float64."""

        def terms(example: Example) -> Point:
            return (self._half(self._run(point, example), example)[0] * 2,)

        return float(self.examples.sums(terms, self._number)[0]) / self.signal

    def objective(self, point: Point) -> float:
        """The value to minimise."""
        return self.error(point) / 2 + self._pulled(point)

    def violation(self, point: Point) -> float:
        """The number of entries outside the support that are not zero."""
        pairs = zip(point, self.support, strict=True)
        return float(sum(int(((weight != 0) & ~mask).sum()) for weight, mask in pairs if mask is not None))

    @torch.no_grad()
    def gradient(self, point: Point, draw: int | None = None) -> tuple[float, Point]:
        """The objective and its gradient, zero outside the support: on a draw, which estimates both, or on all."""

        def zeros() -> tuple[Tensor, ...]:
            return (*self._number(), *self._number(), *(torch.zeros_like(weight) for weight in point))

        def terms(example: Example) -> tuple[Tensor, ...]:
            leaves = tuple(weight.detach().requires_grad_() for weight in point)
            with torch.enable_grad():
                half, product = self._half(self._run(leaves, example), example)
                slopes = torch.autograd.grad(product, leaves, materialize_grads=True)
            return (half, self._tokens(example), *slopes)

        half, tokens, *sums = self.examples.sums(terms, zeros, draw)
        scale = self.tokens / self.signal / float(tokens)
        pull = self.pull / max(1, sum(self._counts))
        for slope, weight, anchor, mask, unit in zip(sums, point, self.anchor, self.support, self.units, strict=True):
            slope.mul_(scale)
            if pull:
                slope.add_(weight - anchor, alpha=pull / unit**2)
            if mask is not None:
                slope.mul_(mask)
        return float(half) * scale + self._pulled(point), tuple(sums)

    def _pulled(self, point: Point) -> float:
        if not self.pull:
            return 0.0
        parts = zip(point, self.anchor, self.units, strict=True)
        total = sum(float((weight - anchor).double().square().sum()) / unit**2 for weight, anchor, unit in parts)
        return self.pull / 2 * total / max(1, sum(self._counts))

    def _run(self, point: Point, example: Example) -> Tensor:
        return first_output(
            functional_call(self.module, dict(zip(self.names, point, strict=True)), example.args, dict(example.kwargs))
        )

    def _half(self, output: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        """sum_t w_t e_t^T S e_t / 2, and a number with its gradient."""
        change = ((output - example.target) * _root_weights(example.target)).flatten(0, -2).T
        weighed = self._weigh(change.detach())
        # S is symmetric, so that the gradient of the half is S e at e.
        return (change.detach() * weighed).sum(dtype=torch.float64) / 2, (change * weighed).sum()

    def _weigh(self, columns: Tensor) -> Tensor:
        return columns if self.metric is None else self.metric.apply(columns)

    def _number(self) -> Point:
        return (torch.zeros((), dtype=torch.float64, device=self.anchor[0].device),)

    def _tokens(self, example: Example) -> Tensor:
        count = example.target.shape[:-1].numel()
        return torch.tensor(float(count), dtype=torch.float64, device=example.target.device)


def _root_weights(target: Float[Tensor, "... out"]) -> Float[Tensor, "... 1"]:
    """1 / |y_t|; a token that answers (next to) nothing counts as the least of the others that does."""
    sizes = linalg.norm(target, -1)[..., None]
    least = torch.finfo(target.dtype).eps * sizes.max()
    return 1 / torch.where(least > 0, sizes.clamp(min=least), 1.0)
