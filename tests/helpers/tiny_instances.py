"""Fixed instances of 2 to 8 weights with their optima by exhaustion, and how near to these the default solvers end.

`python -m tests.helpers.tiny_instances` prints for each kind of problem how many of the instances the default solver
ends at the optimum of, and the largest ratio to it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from optprune.grids import Grid
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM, PartlyFixed, Pattern, RowLimits, RowWise, Unstructured
from optprune.problems import Channels, GridLeastSquares, LayerLoss, SparseLeastSquares
from optprune.solvers import best_basis, solve
from optprune.testing import reference

METRICS = ("none", "diagonal", "full")
SHAPES = ((1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 2), (2, 3), (2, 4), (3, 2), (4, 2))
"""rows and inputs of a weight"""
DAMPED = (1e-6, 1e-2)
"""those of problems on grids: the default solver refuses a singular Gram matrix"""
DAMPINGS = (0.0, 0.0, 1e-6, 1e-2)
"""fractions of the mean diagonal of the Gram matrix"""
AT_OPTIMUM = 1e-6
"""the share of the constant of the loss by which an objective at the optimum may be above it"""


class Draws:
    """Numbers drawn one after the other from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def below(self, count: int) -> int:
        """Return one of the first whole numbers."""
        return int(torch.randint(0, count, (), generator=self.generator))

    def between(self, least: int, most: int) -> int:
        """Return a whole number within limits that may be drawn too."""
        return least + self.below(most - least + 1)

    def happens(self, share: float) -> bool:
        """Return True in a share of the draws."""
        return float(torch.rand((), generator=self.generator)) < share

    def inputs(self, width: int) -> Tensor:
        """Return inputs of a layer: correlated, tied, repeated, few, nearly dependent; some may be dead."""
        kind = self.below(6)
        tokens = self.between(1, width) if kind == 1 else 4 * width + 4
        inputs = self.normal(tokens, width)
        if kind == 2:
            inputs = inputs.round()
        elif kind == 3:
            inputs = inputs[:, torch.randint(0, width, (width,), generator=self.generator)]
        elif kind == 4:
            left, right = torch.linalg.qr(inputs)[0], torch.linalg.qr(self.normal(width, width))[0]
            inputs = tokens**0.5 * left @ torch.diag(torch.logspace(0, -4, width, dtype=torch.float64)) @ right
        elif kind == 5:
            inputs = inputs @ self.normal(width, width)
        if self.happens(0.3):
            inputs = inputs + 2 * self.normal(width)
        if self.happens(0.5):
            dead = torch.randperm(width, generator=self.generator)[: self.between(1, min(2, width - 1))]
            inputs[:, dead] = 0
        return inputs

    def loss(self, rows: int, width: int, metric: str, dampings: tuple[float, ...] = DAMPINGS) -> LayerLoss:
        """Return the loss of a weight on such inputs, damped by one of the given fractions."""
        inputs = self.inputs(width)
        dense = inputs + 0.3 * self.normal(*inputs.shape) if self.happens(0.3) else None
        weight = self.normal(rows, width)
        weight = weight.round() if self.happens(0.2) else weight
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs, dense), dampings[self.below(len(dampings))])
        return self.in_metric(loss, metric)

    def in_metric(self, loss: LayerLoss, metric: str) -> LayerLoss:
        """Return a loss with an output metric of a kind."""
        if metric == "none":
            return loss
        rows = len(loss.weight)
        gradients = self.normal(4 * rows, rows) @ self.normal(rows, rows)
        found = OutputMetric.from_samples(gradients, full=metric == "full")
        return replace(loss, metric=found.damped((0.0, 1e-2)[self.below(2)]))


def _unstructured(draws: Draws, rows: int, width: int) -> Pattern:
    return Unstructured(draws.between(1, rows * width - 1))


def _rows(draws: Draws, rows: int, width: int) -> Pattern:
    return RowWise(draws.between(1, width - 1))


def _groups(draws: Draws, rows: int, width: int) -> Pattern:
    m = 4 if width % 4 == 0 else 2 if width % 2 == 0 else width
    return NM(draws.between(1, m - 1), m)


def _limits(draws: Draws, rows: int, width: int) -> Pattern:
    least = draws.below(2)
    most = draws.between(max(least, 1), width - 1)
    return RowLimits(draws.between(max(1, rows * least), rows * most), least, most)


def _partly_fixed(draws: Draws, rows: int, width: int) -> Pattern:
    pattern = (_unstructured, _rows, _groups, _limits)[draws.below(4)](draws, rows, width)
    mask = pattern.project(draws.normal(rows, width))
    fixed = torch.rand(rows, width, generator=draws.generator) < 0.3
    return PartlyFixed(pattern, mask & fixed, ~mask & fixed)


PATTERNS: dict[str, Callable[[Draws, int, int], Pattern]] = {
    "unstructured": _unstructured,
    "rows": _rows,
    "n:m": _groups,
    "row limits": _limits,
    "partly fixed": _partly_fixed,
}


def sparse_instances(pattern: str, count: int, first: int = 0) -> Iterator[SparseLeastSquares]:
    """Draw choices of single weights under a pattern, with each kind of metric in turn."""
    for seed in range(first, first + count):
        draws = Draws(seed)
        rows, width = SHAPES[draws.below(len(SHAPES))]
        drawn = PATTERNS[pattern](draws, rows, width)
        yield SparseLeastSquares(draws.loss(rows, width, METRICS[seed % 3]), drawn)


def grid_instances(count: int, first: int = 0) -> Iterator[GridLeastSquares]:
    """Draw weights of two bits in one or two blocks of a row, with or without a mask, with each kind of metric."""
    for seed in range(first, first + count):
        draws, metric = Draws(seed), METRICS[seed % 3]
        block, blocks = ((1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (3, 2), (2, 3))[
            draws.below(4 if metric == "full" else 6)
        ]
        width = block * blocks
        rows = max(1, 4 // width) if metric == "full" else draws.between(1, max(1, 8 // width))
        grid = Grid(2, block, draws.happens(0.5), torch.bfloat16 if draws.happens(0.5) else torch.float16)
        mask = torch.rand(rows, width, generator=draws.generator) < 0.7 if draws.happens(0.4) else None
        yield GridLeastSquares(draws.loss(rows, width, metric, DAMPED), grid, mask)


@dataclass(frozen=True)
class Ending:
    """The objective at which a solver ended, the optimum, and the constant of the loss, which is the unit of both."""

    objective: float
    optimum: float
    constant: float

    @property
    def met(self) -> bool:
        """Whether it is the optimum."""
        return self.objective <= self.optimum + AT_OPTIMUM * self.constant

    @property
    def ratio(self) -> float:
        """The ratio to the optimum, where both have as much added as may count as the optimum."""
        slack = AT_OPTIMUM * self.constant
        return (self.objective + slack) / (self.optimum + slack) if slack > 0 else 1.0


def ending(problem: SparseLeastSquares | GridLeastSquares) -> Ending:
    """Return where the default solver ends. On a grid the optimum is that of scales that are stored."""
    best = reference(problem)
    optimum = best.optimum
    if isinstance(problem, GridLeastSquares):
        assert best.weight is not None
        optimum = problem.objective(torch.from_numpy(best.weight))
    return Ending(solve(problem).objective, optimum, problem.loss.constant)


def rotation_instances(count: int, first: int = 0) -> Iterator[tuple[LayerLoss, Channels, int]]:
    """Draw value dimensions of one or two KV heads, each read by one to three query heads, and how many are kept."""
    for seed in range(first, first + count):
        draws = Draws(seed)
        slots, size, tied = ((1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 3, 2), (2, 2, 2), (1, 2, 3))[
            draws.below(8)
        ]
        width = slots * size * tied
        loss = draws.loss(draws.between(1, 4), width, METRICS[seed % 3])
        unit = torch.arange(slots * size)
        slot = unit // size
        columns = (slot[:, None] * tied + torch.arange(tied)) * size + (unit % size)[:, None]
        yield loss, Channels(columns, slot), draws.between(1, size - 1)


class Spans:
    """The least loss of weights V_h = Z_h W^T for directions W of every slot, by NumPy from the definition."""

    def __init__(self, loss: LayerLoss, channels: Channels, keep: int) -> None:
        self.gram, self.keep, self.width = loss.gram.numpy(), keep, len(loss.gram)
        root = np.eye(len(loss.weight))
        if loss.metric is not None:
            values, vectors = np.linalg.eigh(loss.metric.matrix.numpy())
            root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        self.target, self.constant = root @ loss.target.numpy(), loss.constant
        self.columns = channels.columns[channels.by_slot].numpy()

    def loss(self, directions: np.ndarray) -> float:
        """Return the least loss for directions [slots, size, keep]."""
        spread = np.zeros((self.width, self.columns.shape[0] * self.columns.shape[2] * directions.shape[2]))
        place = 0
        for group, basis in zip(self.columns, directions, strict=True):
            for head in group.T:
                spread[head, place : place + basis.shape[1]] = basis
                place += basis.shape[1]
        gram, right = spread.T @ self.gram @ spread, self.target @ spread
        return float(
            self.constant / 2 - np.sum((right @ np.linalg.pinv(gram, rcond=1e-13, hermitian=True)) * right) / 2
        )

    def best(self, starts: int = 12) -> float:
        """Return the least loss over all directions, by BFGS from random ones."""
        from scipy.optimize import minimize

        slots, size, _ = self.columns.shape
        shape, generator = (slots, size, self.keep), np.random.default_rng(0)

        def lost(flat: np.ndarray) -> float:
            return self.loss(np.linalg.qr(flat.reshape(shape))[0]) / (self.constant or 1.0)

        found = (minimize(lost, generator.standard_normal(slots * size * self.keep)) for _ in range(starts))
        return min(each.fun for each in found) * self.constant


def rotated_ending(loss: LayerLoss, channels: Channels, keep: int) -> Ending:
    """Return where the directions of `best_basis` end."""
    spans = Spans(loss, channels, keep)
    found = best_basis(loss, channels, keep).matrices[:, :, :keep].double().numpy()
    return Ending(spans.loss(found), spans.best(), loss.constant)


@cache
def endings(kind: str, count: int, first: int = 0) -> tuple[Ending, ...]:
    """Return where the default ends on instances from a first seed of a kind: a pattern, "grid" or "rotation"."""
    if kind == "rotation":
        return tuple(rotated_ending(*instance) for instance in rotation_instances(count, first))
    drawn = grid_instances(count, first) if kind == "grid" else sparse_instances(kind, count, first)
    return tuple(map(ending, drawn))


KINDS = (*PATTERNS, "grid", "rotation")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How near to the optima of tiny problems the default solvers end.")
    parser.add_argument("--count", type=int, default=90, help="the instances of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("kinds", nargs="*", default=KINDS)
    options = parser.parse_args()
    for kind in options.kinds:
        found = endings(kind, options.count, options.first)
        met = sum(each.met for each in found) / len(found)
        worst = max(range(len(found)), key=lambda i: found[i].ratio)
        twice = [i for i, each in enumerate(found) if each.ratio > 2]
        print(
            f"{kind:15} {met:6.1%} at the optimum; at worst {found[worst].ratio:.4g} times (seed {worst}); "
            f"above twice: {twice}"
        )
