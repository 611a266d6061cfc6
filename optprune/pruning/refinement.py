"""Refinement of a block after its layers are solved: recovery of its sub-modules.

The output of an attention or a gated MLP is affine in each of some layers: the up and the down projection, the values
and the output projection. So each of these layers is a linear least squares problem over the calibration tokens, though
not one of a Gram matrix, and recovery refits them in turn. Held-out tokens decide when to stop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.calibration.partial_sums import OrderedSum, TensorSums
from optprune.metric import OutputMetric
from optprune.models.surgery import write
from optprune.moments import MomentSums
from optprune.numerics.tensors import first_output
from optprune.report import RecoveredPart

PATIENCE = 2
"""a turn ends after this many steps without a smaller error on held-out tokens"""
TRACE_TOKENS = 2048
"""the approximate number of tokens, in whole batches, that estimate the mean diagonal of a Hessian"""


@dataclass(frozen=True)
class ModuleLoss:
    """The squared change of a sub-module's output on the fitted batches and on the held-out ones."""

    module: nn.Module
    fit: Calls
    apart: Calls
    metric: OutputMetric | None

    def error(self, calls: Calls) -> float:
        """Return the mean over tokens of the squared change of the output, in the metric."""
        sums = self.numbers(calls)
        for part, args, kwargs, target in calls.each():
            sums.at(part).add(self.energy(first_output(self.module(*args, **kwargs)) - target))
        return float(sums.total().tensors[0]) / calls.tokens

    def signal(self, calls: Calls) -> float:
        """Return the mean over tokens of the squared targets, in the metric."""
        sums = self.numbers(calls)
        for number, target in enumerate(calls.targets):
            sums.at(calls.part(number)).add(self.energy(target))
        return float(sums.total().tensors[0]) / calls.tokens

    def numbers(self, calls: Calls, *shapes: tuple[int, ...]) -> OrderedSum[TensorSums]:
        """Return empty sums over calls: a number in float64, and tensors of these shapes in the dtype of the module."""
        like = next(weight for weight in self.module.parameters() if weight.is_floating_point())

        def fresh() -> TensorSums:
            number = like.new_zeros((), dtype=torch.float64, requires_grad=False)
            return TensorSums(number, *(like.new_zeros(shape, requires_grad=False) for shape in shapes))

        return OrderedSum(calls.share.partial_sums, fresh)

    def energy(self, change: Float[Tensor, "... out"]) -> Tensor:
        """Return the sum over tokens of e^T S e."""
        columns = change.flatten(0, -2).T
        return (columns * self.weigh(columns)).sum()

    def rooted(self, signs: Float[Tensor, "... out"]) -> Float[Tensor, "... out"]:
        """Return S^(1/2) z for every z."""
        if self.metric is None:
            return signs
        return (
            self.metric.whitening.into(signs.flatten(0, -2).T.to(self.metric.average)).T.reshape(signs.shape).to(signs)
        )

    def weigh(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return S V."""
        return change if self.metric is None else self.metric.apply(change)


class InnerLayer:
    """Half the error as a quadratic of the weight of a layer inside the module; each product takes a pass."""

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
        """Gram matrix of the layer's inputs"""

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return H d: without biases the output is linear in the weight, so d takes its place."""
        loss, sums = self.loss, self.loss.numbers(self.loss.fit, tuple(direction.shape))
        with _without_biases(loss.module, self.layers), torch.enable_grad():
            for part, args, kwargs, _ in loss.fit.each():
                with _weight(self.layer, direction.detach().requires_grad_()) as weight:
                    energy = loss.energy(first_output(loss.module(*args, **kwargs)))
                    sums.at(part).add(energy.detach(), torch.autograd.grad(energy / 2, weight)[0])
        return sums.total().tensors[1] / loss.fit.tokens

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """Return <s, H s> over the first tokens, an estimate of the trace of H where random signs s are not zero."""
        loss, calls = self.loss, self.loss.fit.first(TRACE_TOKENS)
        sums = loss.numbers(calls)
        with _without_biases(loss.module, self.layers), _weight(self.layer, signs):
            for part, args, kwargs, _ in calls.each():
                sums.at(part).add(loss.energy(first_output(loss.module(*args, **kwargs))))
        return float(sums.total().tensors[0]) / calls.tokens

    def outputs(self) -> Float[Tensor, "out out"]:
        """Return E[b b^T] over the first tokens, b the effect of the layer's output on S^(1/2) times the module's.

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
        """Write another weight into the layer, and return the error on the held-out batches."""
        write(self.layer, weight)
        return self.loss.error(self.loss.apart)


class OutputLayer:
    """Half the error as a quadratic of the weight of the module's last layer, from the moments of its inputs."""

    def __init__(self, loss: ModuleLoss, layer: nn.Linear, held_out: float) -> None:
        self.loss, self.start, self.error = loss, layer.weight.detach().clone(), held_out
        self.gradient, self.gram, self.fit_error = self._moments(layer, loss.fit)
        self.apart = self._moments(layer, loss.apart)

    def _moments(self, layer: nn.Linear, calls: Calls) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"], float]:
        """Return the gradient S E[e x^T], E[x x^T] and E[e^T S e] for the inputs x and the errors e."""
        moments, sums = _moments_of(layer, calls), self.loss.numbers(calls, tuple(layer.weight.shape))
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        try:
            for part, args, kwargs, target in calls.each():
                change = first_output(self.loss.module(*args, **kwargs)) - target
                read = inputs.pop()
                moments.at(part).add(read)
                sums.at(part).add(self.loss.energy(change), change.flatten(0, -2).T @ read)
        finally:
            handle.remove()
        error, total = sums.total().tensors
        gradient = self.loss.weigh(total / calls.tokens)
        return gradient, moments.total().moments(total.dtype).gram, float(error) / calls.tokens

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return H d = S d E[x x^T]."""
        return self.loss.weigh(direction) @ self.gram

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """Return <s, H s>, an estimate of the trace of H where random signs s are not zero."""
        return float((signs * self.product(signs)).sum())

    def outputs(self) -> Float[Tensor, "out out"] | None:
        """Return S, or None for the identity; H is outputs (x) gram."""
        metric = self.loss.metric
        return None if metric is None else metric.matrix.to(self.start)

    def held_out(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the error on the held-out batches with another weight."""
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
    """Refit the nonzero weights of the layers of a sub-module in place, each in turn, to match its dense outputs.

    The module's output must be affine in each layer alone; `layers` are in the order of the forward pass, and the last
    one gives the output. A turn minimises half the mean squared change of the output (in the metric, if any) plus a
    ridge towards the weights at its beginning, `damping` times the mean diagonal of the Hessian, by at most `steps`
    steps of conjugate gradients. The preconditioner is the Kronecker product of the Gram matrix of the layer's inputs
    and that of its outputs' effects on the module's output, both damped (K-FAC). The iterate with the least error on
    the held-out batches is written: that error never rises, and neither does the error on the fitted batches. If
    weights will be stored in a `dtype` of lower precision than the module's, iterates are rounded to it before they are
    compared, and the error on the fitted batches may rise by the rounding.
    A step costs a forward and a backward pass of the module; in the turn of the last layer it costs no pass, because
    one pass collects the moments of its inputs.
    """
    began = time.perf_counter()
    loss = ModuleLoss(module, fit, apart, metric)
    turn = _Turn(loss, steps, damping, dtype)
    held_out = held_out_before = loss.error(apart)
    # The errors on the fitted batches, before and after every turn, which computes them anyway.
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
        error_before=relative(before, signal),
        error_after=relative(after, signal),
        held_out_before=relative(held_out_before, held_out_signal),
        held_out_after=relative(held_out, held_out_signal),
        steps=kept,
        seconds=time.perf_counter() - began,
    )


def relative(error: float, signal: float) -> float:
    """Return the error as a share of the signal; without a signal, 1 for any error and 0 for none."""
    return error / signal if signal > 0 else float(error > 0)


@dataclass(frozen=True)
class _TurnResult:
    """The number of steps kept in a turn, and the mean squared change of the output."""

    steps: int
    before: float
    """the change on the fitted batches, with the weight at the beginning of the turn"""
    after: float
    held_out: float
    """the change on the held-out batches, with the weight that is kept"""


@dataclass(frozen=True)
class _Turn:
    """The settings of one layer's least squares problem."""

    loss: ModuleLoss
    steps: int
    damping: float
    dtype: torch.dtype | None = None
    """the dtype to which iterates are rounded, if it is not the module's"""

    def take(self, layers: Sequence[str], held_out: float) -> _TurnResult | None:
        """Refit the first of the layers; return None where it has no nonzero weight."""
        layer: nn.Linear = self.loss.module.get_submodule(layers[0])  # type: ignore[assignment]
        start = layer.weight.detach().clone()
        mask = start != 0
        if not bool(mask.any()):
            return None
        problem = InnerLayer(self.loss, layers) if len(layers) > 1 else OutputLayer(self.loss, layer, held_out)
        # Any vector of signs gives an estimate of the trace: Hutchinson (1989).
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
        return _TurnResult(best_step, problem.fit_error, after, held_out)


def _preconditioner(
    gram: Float[Tensor, "in in"], outputs: Float[Tensor, "out out"] | None, damping: float
) -> Callable[[Tensor], Tensor]:
    """Return the product with (outputs (x) gram)^-1, both factors damped; None for outputs is the identity."""
    left, right = (None if outputs is None else _damped_inverse(outputs, damping)), _damped_inverse(gram, damping)
    alike = _damped_inverse(torch.ones(1, 1).to(gram), damping)
    return lambda residual: (alike * residual if left is None else left @ residual) @ right


def _damped_inverse(factor: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return (A + sqrt(damping) mean(diag A) I)^-1, with a least damping, for a factor of a Kronecker product.

    With both factors damped so, their product is damped by about `damping` times its mean diagonal.
    """
    mean = factor.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(factor)).to(factor)
    damped = factor + max(damping, 1e-3) ** 0.5 * mean * torch.eye(len(factor)).to(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _moments_of(layer: nn.Linear, calls: Calls) -> OrderedSum[MomentSums]:
    """Return empty sums of the moments of a layer's inputs over calls."""
    return OrderedSum(calls.share.partial_sums, partial(MomentSums, layer.in_features, layer.weight.device))


@contextmanager
def _weight(layer: nn.Linear, weight: Tensor) -> Iterator[Tensor]:
    """Put another tensor in the place of the layer's weight, for the duration of the context."""
    kept = layer._parameters["weight"]
    layer._parameters["weight"] = weight  # type: ignore[assignment]  # not a leaf of the model
    try:
        yield weight
    finally:
        layer._parameters["weight"] = kept


@contextmanager
def _without_biases(module: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Remove the biases of these layers for the duration of the context."""
    found = [module.get_submodule(path) for path in layers]
    kept = [(layer, layer._parameters["bias"]) for layer in found]
    try:
        for layer in found:
            layer._parameters["bias"] = None
        yield
    finally:
        for layer, bias in kept:
            layer._parameters["bias"] = bias
