"""Fixed structured problems for several test files: single channels, tied dimensions of two KV heads, biases."""

from itertools import product

import pytest
import torch

from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, StructuredLeastSquares
from optprune.testing.strategies import to_chosen_device

KINDS = ("independent", "mixed", "low rank")


def structured_loss(seed, rows, width, kind="mixed", *, damping=0.01, fit_bias=False):
    """A loss on inputs of one kind; with an odd seed the dense inputs are other ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(6 * width, width)
    if kind == "mixed":
        inputs = inputs @ (normal(width, width) / width**0.5 + 0.5 * torch.eye(width, dtype=torch.float64))
    elif kind == "low rank":
        inputs = normal(6 * width, width // 2) @ normal(width // 2, width) + 0.3 * inputs
    inputs = inputs + normal(width)
    dense = inputs + 0.1 * normal(6 * width, width) if seed % 2 else None
    moments = InputMoments.from_samples(to_chosen_device(inputs), None if dense is None else to_chosen_device(dense))
    return LayerLoss.of(normal(rows, width), moments, damping, fit_bias=fit_bias)


def channels(seed, kind, units=12, keep=6):
    """A choice among single channels."""
    loss = structured_loss(seed, 4, units, kind, fit_bias=seed % 4 < 2)
    return StructuredLeastSquares(loss, Channels.of(units, device=loss.weight.device), keep)


def grouped_query(seed, kind, keep=4):
    """A choice among the 4 dimensions of each of 2 KV heads, each read by two query heads: two columns a unit."""
    loss = structured_loss(seed, 4, 16, kind, fit_bias=seed % 4 < 2)
    unit = to_chosen_device(torch.arange(8))
    columns = torch.stack([unit // 4 * 8 + unit % 4, unit // 4 * 8 + 4 + unit % 4], 1)
    return StructuredLeastSquares(loss, Channels(columns, unit // 4), keep)


def tiny(kind, count=18):
    """Instances small enough to enumerate: twice as many of single channels as of grouped-query heads."""
    for seed in range(count):
        if seed % 3 == 2:
            yield grouped_query(seed, kind, keep=4 + 2 * (seed % 2))
        else:
            yield channels(seed, kind, keep=6 + 3 * (seed % 2))


by_problem = pytest.mark.parametrize("make", [channels, grouped_query])
by_kind = pytest.mark.parametrize("kind", KINDS)


def refitted(problem, choice):
    """The least loss of a choice, by solving the normal equations of the kept columns directly."""
    loss, kept = problem.loss, problem.mask(choice)[0]
    gram, target = loss.gram.double(), loss.target.double()
    weight = torch.zeros_like(target)
    weight[:, kept] = torch.linalg.solve(gram[kept][:, kept], target[:, kept].T).T
    return loss.value(weight)


def admissible(problem):
    """Every admissible choice, [choices, units]."""
    slots = problem.channels.slots
    every = to_chosen_device(torch.tensor(list(product((False, True), repeat=len(slots)))))
    counts = torch.stack([every[:, slots == slot].sum(1) for slot in slots.unique()], 1)
    return every[(counts == problem.pattern.keep).all(1)]
