"""Equivalent problems (permuted, scaled) and random feasible weights, with which the laws compare answers.

A new kind of problem registers how it is permuted, how it is scaled and how to draw a feasible weight.
"""

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.moments import Drift, InputMoments
from optprune.patterns import NM
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import (
    Channels,
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)


def _permuted_loss(loss: LayerLoss, inputs: Tensor, outputs: Tensor) -> LayerLoss:
    actual, drift = loss.moments, loss.moments.drift

    def square(matrix: Tensor) -> Tensor:
        return matrix[inputs][:, inputs]

    if drift is not None:
        drift = Drift(square(drift.cross), square(drift.covariance), drift.mean[inputs])
    moments = InputMoments(square(actual.covariance), actual.mean[inputs], actual.tokens, drift)
    metric = loss.metric
    if metric is not None:
        average = metric.average[outputs][:, outputs] if metric.full else metric.average[outputs]
        metric = OutputMetric(average, metric.damping[outputs], metric.tokens)
    return LayerLoss(loss.weight[outputs][:, inputs], moments, loss.damping[inputs], loss.fit_bias, metric)


def _scaled_loss(loss: LayerLoss, weight: float, inputs: float) -> LayerLoss:
    return replace(in_units(loss, torch.full_like(loss.damping, inputs)), weight=loss.weight * weight)


def in_units(loss: LayerLoss, units: Tensor) -> LayerLoss:
    """Return the loss of the weights V_ij / d_j of inputs x_j d_j, for units d [in], with the same values."""
    units = units.to(loss.weight)
    actual, drift, square = loss.moments, loss.moments.drift, torch.outer(units, units)
    if drift is not None:
        drift = Drift(drift.cross * square, drift.covariance * square, drift.mean * units)
    moments = InputMoments(actual.covariance * square, actual.mean * units, actual.tokens, drift)
    return LayerLoss(loss.weight / units, moments, loss.damping * units.square(), loss.fit_bias, loss.metric)


@singledispatch
def permuted(problem: Problem, inputs: Tensor, outputs: Tensor) -> Problem:
    """Return the problem in which input inputs[k] and output outputs[k] have the index k."""
    raise TypeError(f"a new kind of problem must say how it is permuted: {type(problem).__name__}")


@permuted.register
def _(problem: MaskedLeastSquares, inputs: Tensor, outputs: Tensor) -> Problem:
    mask = problem.mask if problem.mask.shape[0] == 1 else problem.mask[outputs]
    return MaskedLeastSquares(_permuted_loss(problem.loss, inputs, outputs), mask[:, inputs])


@permuted.register
def _(problem: StructuredLeastSquares, inputs: Tensor, outputs: Tensor) -> Problem:
    channels, units = problem.channels, torch.arange(problem.channels.units).flip(0)
    renamed = Channels(torch.argsort(inputs)[channels.columns][units], channels.slots[units])
    return StructuredLeastSquares(_permuted_loss(problem.loss, inputs, outputs), renamed, problem.keep)


@singledispatch
def scaled(problem: Problem, weight: float, inputs: float) -> Problem:
    """Return the problem with weights and inputs times these factors, whose squared product scales the objective."""
    raise TypeError(f"a new kind of problem must say how it is scaled: {type(problem).__name__}")


@scaled.register(MaskedLeastSquares)
@scaled.register(StructuredLeastSquares)
def _(problem: MaskedLeastSquares | StructuredLeastSquares, weight: float, inputs: float) -> Problem:
    return replace(problem, loss=_scaled_loss(problem.loss, weight, inputs))


@singledispatch
def random_feasible(problem: Problem, seed: int) -> Tensor:
    """Return a random feasible weight [out, in], unrelated to the original."""
    raise TypeError(f"a new kind of problem must say how to draw a feasible weight: {type(problem).__name__}")


def _noise(problem: Problem, generator: torch.Generator) -> Tensor:
    noise = torch.randn(problem.loss.weight.shape, generator=generator, dtype=torch.float64)
    return noise.to(problem.loss.weight)


@random_feasible.register
def _(problem: MaskedLeastSquares, seed: int) -> Tensor:
    return _noise(problem, torch.Generator().manual_seed(seed)) * problem.mask


@random_feasible.register
def _(problem: StructuredLeastSquares, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start, slots = _noise(problem, generator), problem.channels.slots
    each = problem.keep // int(slots.max() + 1)
    for slot in slots.unique():
        units = (slots == slot).nonzero()[:, 0]
        gone = units[torch.randperm(units.numel(), generator=generator)[each:]]
        start[:, problem.channels.columns[gone].reshape(-1)] = 0
    return start


@permuted.register
def _(problem: PenalisedLeastSquares, inputs: Tensor, outputs: Tensor) -> Problem:
    penalty = _permuted_penalty(problem.penalty, inputs, outputs)
    return PenalisedLeastSquares(_permuted_loss(problem.loss, inputs, outputs), penalty)


@scaled.register
def _(problem: PenalisedLeastSquares, weight: float, inputs: float) -> Problem:
    penalty = _scaled_penalty(problem.penalty, weight, inputs)
    return PenalisedLeastSquares(_scaled_loss(problem.loss, weight, inputs), penalty)


@random_feasible.register
def _(problem: PenalisedLeastSquares, seed: int) -> Tensor:
    return _noise(problem, torch.Generator().manual_seed(seed))


def _permuted_penalty(penalty: Penalty, inputs: Tensor, outputs: Tensor) -> Penalty:
    if not isinstance(penalty, WeightedL1):
        return penalty
    weights = penalty.weights
    if weights.shape[-1] > 1:
        weights = weights[..., inputs]
    return WeightedL1(weights[outputs] if weights.ndim > 1 and weights.shape[0] > 1 else weights)


def _scaled_penalty(penalty: Penalty, weight: float, inputs: float) -> Penalty:
    """Return the penalty whose value at `weight` V is (weight inputs)^2 times that at V."""
    per_size, per_square = weight * inputs**2, inputs**2
    match penalty:
        case L1(strength):
            return L1(strength * per_size)
        case WeightedL1(weights):
            return WeightedL1(weights * per_size)
        case ElasticNet(strength, ridge):
            return ElasticNet(strength * per_size, ridge * per_square)
        case ColumnGroups(strength):
            return ColumnGroups(strength * per_size)
    raise TypeError(f"a new penalty must say how it is scaled: {type(penalty).__name__}")


@permuted.register
def _(problem: SparseLeastSquares, inputs: Tensor, outputs: Tensor) -> Problem:
    return SparseLeastSquares(_permuted_loss(problem.loss, inputs, outputs), problem.pattern)


@scaled.register
def _(problem: SparseLeastSquares, weight: float, inputs: float) -> Problem:
    return replace(problem, loss=_scaled_loss(problem.loss, weight, inputs))


@random_feasible.register
def _(problem: SparseLeastSquares, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = _noise(problem, generator)
    return start * problem.pattern.project(torch.rand(start.shape, generator=generator))


@permuted.register
def _(problem: GridLeastSquares, inputs: Tensor, outputs: Tensor) -> Problem:
    mask = problem.mask
    if mask is not None:
        mask = (mask if mask.shape[0] == 1 else mask[outputs])[:, inputs]
    return GridLeastSquares(_permuted_loss(problem.loss, inputs, outputs), problem.grid, mask)


@scaled.register
def _(problem: GridLeastSquares, weight: float, inputs: float) -> Problem:
    return replace(problem, loss=_scaled_loss(problem.loss, weight, inputs))


@random_feasible.register
def _(problem: GridLeastSquares, seed: int) -> Tensor:
    return problem.project(_noise(problem, torch.Generator().manual_seed(seed)))


def renaming(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return permutations of the inputs and the outputs that leave the constraints unchanged."""
    rows, width = problem.loss.weight.shape
    generator = torch.Generator().manual_seed(width)
    outputs = torch.arange(rows).flip(0)
    size = 1
    if isinstance(problem, SparseLeastSquares) and isinstance(problem.pattern, NM):
        size = problem.pattern.m
    elif isinstance(problem, GridLeastSquares):
        size = problem.grid.block
    if size > 1:
        # Groups may change places, and the inputs of a group among themselves.
        groups = torch.randperm(width // size, generator=generator)
        inside = torch.stack([torch.randperm(size, generator=generator) for _ in groups])
        return (groups[:, None] * size + inside).reshape(-1), outputs
    return torch.randperm(width, generator=generator), outputs
