"""Recovery: once the masks are chosen, the kept weights of a sub-module are refitted against its dense output.

The output of an attention or a gated MLP is affine in some of its layers, taken one at a time: in the up and the down
projection, in the values and the output projection. So each is a linear least squares problem over the calibration
tokens, though not one over a Gram matrix, and the layers take turns. Tokens that no step sees decide where to stop.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.calibration.partial_sums import OrderedSum, TensorSums
from optprune.metric import OutputMetric
from optprune.models.surgery import write
from optprune.moments import MomentSums
from optprune.numerics.tensors import first_output
from optprune.problems import BlockMatching, Example, Examples
from optprune.problems.matching import Point, Terms, order
from optprune.report import RecoveredPart
from optprune.solvers import Descent, match

PATIENCE = 2
"""a turn ends after so many steps that made the error on the tokens kept apart no smaller"""
TRACE_TOKENS = 2048
"""about so many tokens, whole batches from the first, estimate the mean diagonal of a Hessian that takes passes"""


@dataclass(frozen=True)
class ModuleLoss:
    """The squared change of a sub-module's output on the batches fitted and on those kept apart."""

    module: nn.Module
    fit: Calls
    apart: Calls
    metric: OutputMetric | None

    def error(self, calls: Calls) -> float:
        """The mean over tokens of the squared change of the output, in the metric."""
        sums = self.numbers(calls)
        for part, args, kwargs, target in calls.each():
            sums.at(part).add(self.energy(first_output(self.module(*args, **kwargs)) - target))
        return float(sums.total().tensors[0]) / calls.tokens

    def signal(self, calls: Calls) -> float:
        """The mean over tokens of the squared targets themselves, in the metric."""
        sums = self.numbers(calls)
        for number, target in enumerate(calls.targets):
            sums.at(calls.part(number)).add(self.energy(target))
        return float(sums.total().tensors[0]) / calls.tokens

    def numbers(self, calls: Calls, *shapes: tuple[int, ...]) -> OrderedSum[TensorSums]:
        """Sums over calls, of numbers in float64, and of tensors of these shapes in the dtype of the module."""
        like = next(self.module.parameters())

        def fresh() -> TensorSums:
            number = like.new_zeros((), dtype=torch.float64, requires_grad=False)
            return TensorSums(number, *(like.new_zeros(shape, requires_grad=False) for shape in shapes))

        return OrderedSum(calls.share.partial_sums, fresh)

    def energy(self, change: Float[Tensor, "... out"]) -> Tensor:
        """The sum over tokens of e^T S e."""
        columns = change.flatten(0, -2).T
        return (columns * self.weigh(columns)).sum()

    def rooted(self, signs: Float[Tensor, "... out"]) -> Float[Tensor, "... out"]:
        """S^(1/2) z for every z."""
        if self.metric is None:
            return signs
        return (
            self.metric.whitening.into(signs.flatten(0, -2).T.to(self.metric.average)).T.reshape(signs.shape).to(signs)
        )

    def weigh(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """S V."""
        return change if self.metric is None else self.metric.apply(change)


class Inside:
    """Half the error as a quadratic of the weight of a layer inside the module: every product takes a pass."""

    def __init__(self, loss: ModuleLoss, layers: Sequence[str]) -> None:
        self.loss, self.layers = loss, layers
        self.layer: nn.Linear = loss.module.get_submodule(layers[0])  # type: ignore[assignment]
        moments, sums = _moments_of(self.layer, loss.fit), loss.numbers(loss.fit, tuple(self.layer.weight.shape))
        inputs: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        try:
            for part, args, kwargs, target in loss.fit.each():
                with torch.enable_grad(), _weight(self.layer, self.layer.weight.detach().requires_grad_()) as weight:
                    half = loss.energy(first_output(loss.module(*args, **kwargs)) - target) / 2
                    sums.at(part).add(2 * half.detach().double(), torch.autograd.grad(half, weight)[0])
                moments.at(part).add(inputs.pop())
        finally:
            handle.remove()
        error, total = sums.total().tensors
        self.fit_error = float(error) / loss.fit.tokens
        self.gradient: Float[Tensor, "out in"] = total / loss.fit.tokens
        self.gram: Float[Tensor, "in in"] = moments.total().moments(total.dtype).gram
        """the Gram matrix of the layer's inputs"""

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """H d: without biases the output is linear in the weight, so d takes its place."""
        loss, sums = self.loss, self.loss.numbers(self.loss.fit, tuple(direction.shape))
        with _without_biases(loss.module, self.layers), torch.enable_grad():
            for part, args, kwargs, _ in loss.fit.each():
                with _weight(self.layer, direction.detach().requires_grad_()) as weight:
                    energy = loss.energy(first_output(loss.module(*args, **kwargs)))
                    sums.at(part).add(energy.detach(), torch.autograd.grad(energy / 2, weight)[0])
        return sums.total().tensors[1] / loss.fit.tokens

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """<s, H s> over the first tokens, which for random signs s estimates the trace of H where s is not zero."""
        loss, calls = self.loss, self.loss.fit.first(TRACE_TOKENS)
        sums = loss.numbers(calls)
        with _without_biases(loss.module, self.layers), _weight(self.layer, signs):
            for part, args, kwargs, _ in calls.each():
                sums.at(part).add(loss.energy(first_output(loss.module(*args, **kwargs))))
        return float(sums.total().tensors[0]) / calls.tokens

    def outputs(self) -> Float[Tensor, "out out"]:
        """E[b b^T] over the first tokens, b the effect of the layer's output on the module's in the metric's root.

        With it H is near outputs (x) gram (K-FAC; Martens and Grosse, 2015): the effect is drawn with random signs.
        """
        loss, layer, calls = self.loss, self.layer, self.loss.fit.first(TRACE_TOKENS)
        sums = loss.numbers(calls, (layer.out_features, layer.out_features))
        # Each part draws its own signs.
        generators = [torch.Generator().manual_seed(part) for part in calls.share.partial_sums.numbers]
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            caught.append(output.detach().requires_grad_())
            return caught[-1]

        handle = layer.register_forward_hook(catch)
        try:
            for part, args, kwargs, _ in calls.each():
                with torch.enable_grad():
                    answer = first_output(loss.module(*args, **kwargs))
                    signs = torch.randint(0, 2, answer.shape, generator=generators[part]).to(answer) * 2 - 1
                    effect = torch.autograd.grad(answer, caught.pop(), loss.rooted(signs))[0].flatten(0, -2)
                sums.at(part).tensors[1].add_(effect.T @ effect)
        finally:
            handle.remove()
        return sums.total().tensors[1] / calls.tokens

    def held_out(self, weight: Float[Tensor, "out in"]) -> float:
        """The error on the batches kept apart with another weight, which the layer then has."""
        write(self.layer, weight)
        return self.loss.error(self.loss.apart)


class AtOutput:
    """Half the error as a quadratic of the weight of the layer that gives the output: one pass finds the moments of its
    inputs, which say all."""

    def __init__(self, loss: ModuleLoss, layer: nn.Linear, held_out: float) -> None:
        self.loss, self.start, self.error = loss, layer.weight.detach().clone(), held_out
        self.gradient, self.gram, self.fit_error = self._moments(layer, loss.fit)
        self.apart = self._moments(layer, loss.apart)

    def _moments(self, layer: nn.Linear, calls: Calls) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"], float]:
        """S E[e x^T], which is the gradient, E[x x^T] and E[e^T S e], for the inputs x and the errors e."""
        moments, sums = _moments_of(layer, calls), self.loss.numbers(calls, tuple(layer.weight.shape))
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        try:
            for part, args, kwargs, target in calls.each():
                change = first_output(self.loss.module(*args, **kwargs)) - target
                seen = inputs.pop()
                moments.at(part).add(seen)
                sums.at(part).add(self.loss.energy(change), change.flatten(0, -2).T @ seen)
        finally:
            handle.remove()
        error, total = sums.total().tensors
        gradient = self.loss.weigh(total / calls.tokens)
        return gradient, moments.total().moments(total.dtype).gram, float(error) / calls.tokens

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """H d = S d E[x x^T]."""
        return self.loss.weigh(direction) @ self.gram

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """<s, H s>, which for random signs s estimates the trace of H where s is not zero."""
        return float((signs * self.product(signs)).sum())

    def outputs(self) -> Float[Tensor, "out out"] | None:
        """S, None where outputs count alike: H is outputs (x) gram."""
        metric = self.loss.metric
        return None if metric is None else metric.matrix.to(self.start)

    def held_out(self, weight: Float[Tensor, "out in"]) -> float:
        """The error on the batches kept apart with another weight."""
        gradient, gram, _ = self.apart
        change = weight - self.start
        return self.error + float((change * (2 * gradient + self.loss.weigh(change) @ gram)).sum())


def recover(
    module: nn.Module,
    layers: Sequence[str],
    fit: Calls,
    apart: Calls,
    *,
    rounds: int = 1,
    steps: int = 8,
    damping: float = 0.1,
    metric: OutputMetric | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> RecoveredPart:
    """Refit the nonzero weights of the layers of a sub-module in place, each in turn, so that it answers the targets.

    Its output must be affine in each layer alone; `layers` are in the order of the forward pass, down to the one that
    gives the output. A turn minimises half the mean squared change of the output (in the metric, where there is one)
    plus a ridge towards the weights at its beginning, `damping` times the mean diagonal of the Hessian, by at most
    `steps` steps of conjugate gradients. The preconditioner is the Kronecker product of the Gram matrix of the layer's
    inputs and that of its outputs' effects on the answer, both damped (K-FAC). Of all iterates the one with the least
    error on the batches kept apart is written: that error never rises, and neither does the one on the batches fitted.
    Where weights will be stored in a `dtype` of fewer digits than the module has, iterates are tried as rounded to it:
    the error on the batches fitted may then rise by what that costs.
    A step costs a forward and a backward pass of the module, but in the turn of the last layer nothing: the moments of
    its inputs, from one pass, say all.
    """
    began = time.perf_counter()
    loss = ModuleLoss(module, fit, apart, metric)
    turn = _Turn(loss, steps, damping, dtype)
    held_out = held_out_before = loss.error(apart)
    # On the batches fitted, before and after every turn, which learns them on its way.
    errors, kept = list[float](), 0
    for _ in range(rounds):
        moved = 0
        for position in range(len(layers)):
            taken = turn.take(layers[position:], held_out)
            if taken is not None:
                moved, held_out = moved + taken.steps, taken.held_out
                errors += [taken.before, taken.after]
        kept += moved
        if not moved:
            break
    signal, held_out_signal = loss.signal(fit), loss.signal(apart)
    before, after = (errors[0], errors[-1]) if errors else (loss.error(fit),) * 2
    if kept and dtype is not None:
        after = loss.error(fit)
    return RecoveredPart(
        name=name,
        layers=tuple(layers),
        error_before=_share(before, signal),
        error_after=_share(after, signal),
        held_out_before=_share(held_out_before, held_out_signal),
        held_out_after=_share(held_out, held_out_signal),
        steps=kept,
        seconds=time.perf_counter() - began,
    )


def _share(error: float, signal: float) -> float:
    """The error as a share of the signal; of none, 1 stands for any error, as in a layer's relative error."""
    return error / signal if signal > 0 else float(error > 0)


@dataclass(frozen=True)
class _Taken:
    """What a turn did: the steps kept, and the mean squared change of the output."""

    steps: int
    before: float
    """the change on the batches fitted, with the weight that the turn began with"""
    after: float
    held_out: float
    """the change on the batches kept apart, with the weight kept"""


@dataclass(frozen=True)
class _Turn:
    """What one layer's least squares problem is made of."""

    loss: ModuleLoss
    steps: int
    damping: float
    dtype: torch.dtype | None = None
    """what iterates are rounded to, where that is not the module's own"""

    def take(self, layers: Sequence[str], held_out: float) -> _Taken | None:
        """Refit the first of the layers; None where it has no weight to refit."""
        layer: nn.Linear = self.loss.module.get_submodule(layers[0])  # type: ignore[assignment]
        start = layer.weight.detach().clone()
        mask = start != 0
        if not bool(mask.any()):
            return None
        problem = Inside(self.loss, layers) if len(layers) > 1 else AtOutput(self.loss, layer, held_out)
        # Any vector of signs is an estimate of the trace: Hutchinson (1989).
        signs = torch.randint(0, 2, start.shape, generator=torch.Generator().manual_seed(0)).to(start) * 2 - 1
        ridge = self.damping * problem.trace(torch.where(mask, signs, 0.0)) / int(mask.sum())
        precondition = _preconditioner(problem.gram, problem.outputs(), self.damping)
        at, residual = start, -torch.where(mask, problem.gradient, 0.0)
        direction = torch.where(mask, precondition(residual), 0.0)
        energy = float((residual * direction).sum())
        best, best_step, after = start, 0, problem.fit_error
        pulled = torch.zeros_like(start)  # H (at - start)
        for step in range(1, self.steps + 1):
            if not energy > 0 or step > best_step + PATIENCE:
                break
            product = problem.product(direction)
            curvature = float((direction * product).sum())
            curvature += ridge * float(direction.square().sum())
            if not curvature > 0:
                break
            length = energy / curvature
            at, pulled = at + length * direction, pulled + length * product
            tried = at if self.dtype is None else at.to(self.dtype).to(at)
            error = problem.held_out(tried)
            if error < held_out:
                best, best_step, held_out = tried, step, error
                after = problem.fit_error + float(((at - start) * (2 * problem.gradient + pulled)).sum())
            residual = residual - length * torch.where(mask, product + ridge * direction, 0.0)
            preconditioned = torch.where(mask, precondition(residual), 0.0)
            fresh = float((residual * preconditioned).sum())
            direction, energy = preconditioned + fresh / energy * direction, fresh
        write(layer, best)
        return _Taken(best_step, problem.fit_error, after, held_out)


def _preconditioner(
    gram: Float[Tensor, "in in"], outputs: Float[Tensor, "out out"] | None, damping: float
) -> Callable[[Tensor], Tensor]:
    """(outputs (x) gram)^-1 with both factors damped; no outputs stand for the identity, whose inverse is a number."""
    left, right = (None if outputs is None else _damped_inverse(outputs, damping)), _damped_inverse(gram, damping)
    alike = _damped_inverse(torch.ones(1, 1).to(gram), damping)
    return lambda residual: (alike * residual if left is None else left @ residual) @ right


def _damped_inverse(factor: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """(A + sqrt(damping) mean(diag A) I)^-1, with some damping in any case, for a factor of a Kronecker product.

    Both factors damped so, their product is damped by about `damping` times its mean diagonal.
    """
    mean = factor.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(factor)).to(factor)
    damped = factor + max(damping, 1e-3) ** 0.5 * mean * torch.eye(len(factor)).to(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _moments_of(layer: nn.Linear, calls: Calls) -> OrderedSum[MomentSums]:
    """The sums of the moments of a layer's inputs over calls."""
    return OrderedSum(calls.share.partial_sums, partial(MomentSums, layer.in_features, layer.weight.device))


@contextmanager
def _weight(layer: nn.Linear, weight: Tensor) -> Iterator[Tensor]:
    """The layer with another tensor in its weight's place."""
    kept = layer._parameters["weight"]
    layer._parameters["weight"] = weight  # type: ignore[assignment]  # not a leaf of the model
    try:
        yield weight
    finally:
        layer._parameters["weight"] = kept


@contextmanager
def _without_biases(module: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """The sub-module without the biases of these layers."""
    found = [module.get_submodule(path) for path in layers]
    kept = [(layer, layer._parameters["bias"]) for layer in found]
    try:
        for layer in found:
            layer._parameters["bias"] = None
        yield
    finally:
        for layer, bias in kept:
            layer._parameters["bias"] = bias


@final
class Sequences(Examples):
    """The sequences of a block's calls, one an example. A draw has a few of every part."""

    def __init__(self, calls: Calls, at_once: int) -> None:
        """A draw has `at_once` sequences of each part, as long as there are any."""
        self.calls, self.partial_sums = calls, calls.share.partial_sums
        self._places: list[list[tuple[int, int]]] = [[] for _ in range(self.partial_sums.own)]
        """the call and the place in it of every sequence, by this process's partial sums"""
        for number, shape in enumerate(calls.targets.shapes):
            self._places[calls.part(number)] += [(number, place) for place in range(shape[0])]
        counts = [len(places) for places in self._places]
        most = max(max(every, default=0) for every in self.partial_sums.peers.all_gather(counts))
        self.at_once, self.draws = at_once, max(1, -(-most // at_once))

    def sums(self, terms: Terms, zeros: Callable[[], tuple[Tensor, ...]], draw: int | None = None) -> Point:
        sums = OrderedSum(self.partial_sums, lambda: TensorSums(*zeros()))
        for part, places in enumerate(self._places):
            for number, place in places if draw is None else self._drawn(places, draw):
                # The first before there is room for sums, none while the next is made: that needs room inside a block.
                found = terms(self._example(number, place))
                sums.at(part).add(*found)
                del found
        return sums.total().tensors

    def _drawn(self, places: list[tuple[int, int]], draw: int) -> list[tuple[int, int]]:
        epoch, turn = divmod(draw, self.draws)
        chosen = order(len(places), epoch)[turn * self.at_once : (turn + 1) * self.at_once]
        return [places[number] for number in chosen]

    def _example(self, number: int, place: int) -> Example:
        (args, kwargs), target = self.calls.arguments[number], self.calls.targets[number]
        size, rows = len(target), slice(place, place + 1)
        return Example(_rows(args, size, rows), _rows(kwargs, size, rows), target[rows])


def _rows(value: Any, size: int, rows: slice) -> Any:
    """Rows of a batch of a size in all that nested values hold of it; what all its sequences share stays whole."""
    if isinstance(value, Tensor):
        # Positions [length] are shared, whatever their number.
        return value[rows] if value.ndim > 1 and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: _rows(part, size, rows) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(part, size, rows) for part in value)
    return value


def match_block(
    block: nn.Module,
    fit: Calls,
    apart: Calls,
    solver: Descent[Any],
    *,
    at_once: int = 1,
    pull: float = 0.0,
    metric: OutputMetric | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> RecoveredPart:
    """Move the parameters of a block in place, zeros of its matrices kept, so that it answers the targets.

    A draw of the solver has `at_once` sequences of each part. The state with the least error on the calls kept apart
    stays, rounded to a `dtype` where weights will be stored in one of fewer digits than the block has: that error
    never rises. InputError where the block itself has too few.
    """
    began = time.perf_counter()
    problem = BlockMatching.of(block, Sequences(fit, at_once), metric, pull)
    rounded = None if dtype is None else partial(Tensor.to, dtype=dtype)
    found = match(problem, solver, Sequences(apart, at_once), rounded=rounded)
    return RecoveredPart(
        name=name,
        layers=problem.names,
        error_before=found.error_before,
        error_after=found.error,
        held_out_before=found.held_out_before,
        held_out_after=found.held_out,
        steps=found.steps,
        seconds=time.perf_counter() - began,
    )
