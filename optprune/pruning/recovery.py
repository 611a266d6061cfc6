"""Recovery: once the masks are chosen, the kept weights of a sub-module are refitted against its dense output.

The output of an attention or a gated MLP is affine in some of its layers, taken one at a time: in the up and the down
projection, in the values and the output projection. So each is a linear least squares problem over the calibration
tokens, though not one over a Gram matrix, and the layers take turns. Tokens that no step sees decide where to stop.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.calibration.stream import first_output
from optprune.metric import OutputMetric
from optprune.models.decoder import write
from optprune.moments import MomentSums
from optprune.report import RecoveredPart

PATIENCE = 2
"""a turn ends after so many steps that made the error on the tokens kept apart no smaller"""
TRACE_TOKENS = 2048
"""about so many tokens, whole batches from the first, estimate the mean diagonal of a Hessian that takes passes"""


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
    name: str = "",
) -> RecoveredPart:
    """Refit the nonzero weights of the layers of a sub-module in place, each in turn, so that it answers the targets.

    Its output must be affine in each layer alone; `layers` are in the order of the forward pass, down to the one that
    gives the output. A turn minimises half the mean squared change of the output (in the metric, where there is one)
    plus a ridge towards the weights at its beginning, `damping` times the mean diagonal of the Hessian, by at most
    `steps` steps of conjugate gradients. The preconditioner is the Kronecker product of the Gram matrix of the layer's
    inputs and that of its outputs' effects on the answer, both damped (K-FAC). Of all iterates the one with the least
    error on the batches kept apart is written: that error never rises, and neither does the one on the batches fitted.
    A step costs a forward and a backward pass of the module, but in the turn of the last layer nothing: the moments of
    its inputs, from one pass, say all.
    """
    began = time.perf_counter()
    turn = _Turn(module, fit, apart, metric, steps, damping)
    held_out = held_out_before = turn.error(apart)
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
    signal, held_out_signal = turn.signal(fit), turn.signal(apart)
    before, after = (errors[0], errors[-1]) if errors else (turn.error(fit),) * 2
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
    """on the batches fitted, with the weight that the turn began with"""
    after: float
    held_out: float
    """on the batches kept apart, with the weight kept"""


@dataclass(frozen=True)
class _Turn:
    """What one layer's least squares problem is made of."""

    module: nn.Module
    fit: Calls
    apart: Calls
    metric: OutputMetric | None
    steps: int
    damping: float

    def take(self, layers: Sequence[str], held_out: float) -> _Taken | None:
        """Refit the first of the layers; None where it has no weight to refit."""
        layer: nn.Linear = self.module.get_submodule(layers[0])  # type: ignore[assignment]
        start = layer.weight.detach().clone()
        mask = start != 0
        if not bool(mask.any()):
            return None
        problem = _Inside(self, layers) if len(layers) > 1 else _AtOutput(self, layer, held_out)
        # Any vector of signs is an estimate of the trace: Hutchinson (1989).
        signs = torch.randint(0, 2, start.shape, generator=torch.Generator().manual_seed(0)).to(start) * 2 - 1
        ridge = self.damping * problem.trace(torch.where(mask, signs, 0.0)) / int(mask.sum())
        inputs, outputs = (_damped_inverse(factor, self.damping) for factor in (problem.gram, problem.outputs()))
        at, residual = start, -torch.where(mask, problem.gradient, 0.0)
        direction = torch.where(mask, outputs @ residual @ inputs, 0.0)
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
            error = problem.held_out(at)
            if error < held_out:
                best, best_step, held_out = at, step, error
                after = problem.fit_error + float(((at - start) * (2 * problem.gradient + pulled)).sum())
            residual = residual - length * torch.where(mask, product + ridge * direction, 0.0)
            preconditioned = torch.where(mask, outputs @ residual @ inputs, 0.0)
            fresh = float((residual * preconditioned).sum())
            direction, energy = preconditioned + fresh / energy * direction, fresh
        write(layer, best)
        return _Taken(best_step, problem.fit_error, after, held_out)

    def error(self, calls: Calls) -> float:
        """The mean over tokens of the squared change of the output, in the metric."""
        total = 0.0
        for (args, kwargs), target in zip(calls.arguments, calls.targets, strict=True):
            total += float(self.energy(first_output(self.module(*args, **kwargs)) - target))
        return total / calls.tokens

    def signal(self, calls: Calls) -> float:
        """The same of the targets themselves."""
        return sum(float(self.energy(target)) for target in calls.targets) / calls.tokens

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


class _Inside:
    """Half the error as a quadratic of the weight of a layer inside the module: every product takes a pass."""

    def __init__(self, turn: _Turn, layers: Sequence[str]) -> None:
        self.turn, self.layers = turn, layers
        self.layer: nn.Linear = turn.module.get_submodule(layers[0])  # type: ignore[assignment]
        sums = MomentSums(self.layer.in_features, self.layer.weight.device)
        total, error = torch.zeros_like(self.layer.weight), 0.0
        handle = self.layer.register_forward_pre_hook(lambda _, args: sums.add(args[0].detach()))
        try:
            for (args, kwargs), target in zip(turn.fit.arguments, turn.fit.targets, strict=True):
                with torch.enable_grad(), _weight(self.layer, self.layer.weight.detach().requires_grad_()) as weight:
                    half = turn.energy(first_output(turn.module(*args, **kwargs)) - target) / 2
                    total += torch.autograd.grad(half, weight)[0]
                    error += 2 * float(half.detach())
        finally:
            handle.remove()
        self.fit_error = error / turn.fit.tokens
        self.gradient: Float[Tensor, "out in"] = total / turn.fit.tokens
        self.gram: Float[Tensor, "in in"] = sums.moments(total.dtype).gram
        """of the layer's inputs"""

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """H d: without biases the output is linear in the weight, so d takes its place."""
        turn, total = self.turn, torch.zeros_like(direction)
        with _without_biases(turn.module, self.layers), torch.enable_grad():
            for args, kwargs in turn.fit.arguments:
                with _weight(self.layer, direction.detach().requires_grad_()) as weight:
                    energy = turn.energy(first_output(turn.module(*args, **kwargs)))
                    total += torch.autograd.grad(energy / 2, weight)[0]
        return total / turn.fit.tokens

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """<s, H s> over the first tokens, which for random signs s estimates the trace of H where s is not zero."""
        turn, calls, value = self.turn, self.turn.fit.first(TRACE_TOKENS), 0.0
        with _without_biases(turn.module, self.layers), _weight(self.layer, signs):
            for args, kwargs in calls.arguments:
                value += float(turn.energy(first_output(turn.module(*args, **kwargs))))
        return value / calls.tokens

    def outputs(self) -> Float[Tensor, "out out"]:
        """E[b b^T] over the first tokens, b the effect of the layer's output on the module's in the metric's root.

        With it H is near outputs (x) gram (K-FAC; Martens and Grosse, 2015): the effect is drawn with random signs.
        """
        turn, layer, calls = self.turn, self.layer, self.turn.fit.first(TRACE_TOKENS)
        total = layer.weight.new_zeros(layer.out_features, layer.out_features)
        generator = torch.Generator().manual_seed(0)
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            caught.append(output.detach().requires_grad_())
            return caught[-1]

        handle = layer.register_forward_hook(catch)
        try:
            for args, kwargs in calls.arguments:
                with torch.enable_grad():
                    answer = first_output(turn.module(*args, **kwargs))
                    signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
                    effect = torch.autograd.grad(answer, caught.pop(), turn.rooted(signs))[0].flatten(0, -2)
                total += effect.T @ effect
        finally:
            handle.remove()
        return total / calls.tokens

    def held_out(self, weight: Float[Tensor, "out in"]) -> float:
        """The error on the batches kept apart with another weight, which the layer then has."""
        write(self.layer, weight)
        return self.turn.error(self.turn.apart)


class _AtOutput:
    """The same for the layer that gives the output: the moments of its inputs say all, from one pass."""

    def __init__(self, turn: _Turn, layer: nn.Linear, held_out: float) -> None:
        self.turn, self.start, self.error = turn, layer.weight.detach().clone(), held_out
        self.gradient, self.gram, self.fit_error = self._moments(layer, turn.fit)
        self.apart = self._moments(layer, turn.apart)

    def _moments(self, layer: nn.Linear, calls: Calls) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"], float]:
        """S E[e x^T], which is the gradient, E[x x^T] and E[e^T S e], for the inputs x and the errors e."""
        sums, total, error = MomentSums(layer.in_features, layer.weight.device), torch.zeros_like(layer.weight), 0.0
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        try:
            for (args, kwargs), target in zip(calls.arguments, calls.targets, strict=True):
                change = first_output(self.turn.module(*args, **kwargs)) - target
                seen = inputs.pop()
                sums.add(seen)
                total += change.flatten(0, -2).T @ seen
                error += float(self.turn.energy(change))
        finally:
            handle.remove()
        return self.turn.weigh(total / calls.tokens), sums.moments(total.dtype).gram, error / calls.tokens

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """H d = S d E[x x^T]."""
        return self.turn.weigh(direction) @ self.gram

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """<s, H s>, which for random signs s estimates the trace of H where s is not zero."""
        return float((signs * self.product(signs)).sum())

    def outputs(self) -> Float[Tensor, "out out"]:
        """S: H is outputs (x) gram."""
        metric, width = self.turn.metric, len(self.start)
        return torch.eye(width).to(self.start) if metric is None else metric.matrix.to(self.start)

    def held_out(self, weight: Float[Tensor, "out in"]) -> float:
        """The error on the batches kept apart with another weight."""
        gradient, gram, _ = self.apart
        change = weight - self.start
        return self.error + float((change * (2 * gradient + self.turn.weigh(change) @ gram)).sum())


def _damped_inverse(factor: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """(A + sqrt(damping) mean(diag A) I)^-1, with some damping in any case, for a factor of a Kronecker product.

    Both factors damped so, their product is damped by about `damping` times its mean diagonal.
    """
    mean = factor.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(factor)).to(factor)
    damped = factor + max(damping, 1e-3) ** 0.5 * mean * torch.eye(len(factor)).to(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


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
