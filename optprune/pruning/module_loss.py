"""The error of a sub-module against its dense output, and what it is as a quadratic of one layer's weight."""

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
from optprune.models.surgery import write
from optprune.moments import MomentSums

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
        total = 0.0
        for (args, kwargs), target in zip(calls.arguments, calls.targets, strict=True):
            total += float(self.energy(first_output(self.module(*args, **kwargs)) - target))
        return total / calls.tokens

    def signal(self, calls: Calls) -> float:
        """The mean over tokens of the squared targets themselves, in the metric."""
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


class Inside:
    """Half the error as a quadratic of the weight of a layer inside the module: every product takes a pass."""

    def __init__(self, loss: ModuleLoss, layers: Sequence[str]) -> None:
        self.loss, self.layers = loss, layers
        self.layer: nn.Linear = loss.module.get_submodule(layers[0])  # type: ignore[assignment]
        sums = MomentSums(self.layer.in_features, self.layer.weight.device)
        total, error = torch.zeros_like(self.layer.weight), 0.0
        handle = self.layer.register_forward_pre_hook(lambda _, args: sums.add(args[0].detach()))
        try:
            for (args, kwargs), target in zip(loss.fit.arguments, loss.fit.targets, strict=True):
                with torch.enable_grad(), _weight(self.layer, self.layer.weight.detach().requires_grad_()) as weight:
                    half = loss.energy(first_output(loss.module(*args, **kwargs)) - target) / 2
                    total += torch.autograd.grad(half, weight)[0]
                    error += 2 * float(half.detach())
        finally:
            handle.remove()
        self.fit_error = error / loss.fit.tokens
        self.gradient: Float[Tensor, "out in"] = total / loss.fit.tokens
        self.gram: Float[Tensor, "in in"] = sums.moments(total.dtype).gram
        """the Gram matrix of the layer's inputs"""

    def product(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """H d: without biases the output is linear in the weight, so d takes its place."""
        loss, total = self.loss, torch.zeros_like(direction)
        with _without_biases(loss.module, self.layers), torch.enable_grad():
            for args, kwargs in loss.fit.arguments:
                with _weight(self.layer, direction.detach().requires_grad_()) as weight:
                    energy = loss.energy(first_output(loss.module(*args, **kwargs)))
                    total += torch.autograd.grad(energy / 2, weight)[0]
        return total / loss.fit.tokens

    def trace(self, signs: Float[Tensor, "out in"]) -> float:
        """<s, H s> over the first tokens, which for random signs s estimates the trace of H where s is not zero."""
        loss, calls, value = self.loss, self.loss.fit.first(TRACE_TOKENS), 0.0
        with _without_biases(loss.module, self.layers), _weight(self.layer, signs):
            for args, kwargs in calls.arguments:
                value += float(loss.energy(first_output(loss.module(*args, **kwargs))))
        return value / calls.tokens

    def outputs(self) -> Float[Tensor, "out out"]:
        """E[b b^T] over the first tokens, b the effect of the layer's output on the module's in the metric's root.

        With it H is near outputs (x) gram (K-FAC; Martens and Grosse, 2015): the effect is drawn with random signs.
        """
        loss, layer, calls = self.loss, self.layer, self.loss.fit.first(TRACE_TOKENS)
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
                    answer = first_output(loss.module(*args, **kwargs))
                    signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
                    effect = torch.autograd.grad(answer, caught.pop(), loss.rooted(signs))[0].flatten(0, -2)
                total += effect.T @ effect
        finally:
            handle.remove()
        return total / calls.tokens

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
        sums, total, error = MomentSums(layer.in_features, layer.weight.device), torch.zeros_like(layer.weight), 0.0
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        try:
            for (args, kwargs), target in zip(calls.arguments, calls.targets, strict=True):
                change = first_output(self.loss.module(*args, **kwargs)) - target
                seen = inputs.pop()
                sums.add(seen)
                total += change.flatten(0, -2).T @ seen
                error += float(self.loss.energy(change))
        finally:
            handle.remove()
        return self.loss.weigh(total / calls.tokens), sums.moments(total.dtype).gram, error / calls.tokens

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
