"""The error of a sub-module against its dense output, and what it is as a quadratic of one layer's weight."""

from collections.abc import Iterator, Sequence
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
from optprune.numerics.modules import first_output
from optprune.sums import MomentSums

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
        # Each partial sum draws its own signs.
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
