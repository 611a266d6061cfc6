"""Costs of single weights, and the budget that they divide: shares of layers, or the layers that stay dense."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from optprune.allocation.allocation import Allocation
from optprune.allocation.by_cost import CostBudget, Costs, rate_of
from optprune.allocation.knapsack import Curve, fill_budget, global_threshold, share_budget
from optprune.calibration import Change, DenseStatistics, Probe
from optprune.models import BlockAllocation, Decoder, Target
from optprune.patterns import PatternFamily, in_order
from optprune.problems import LayerLoss, MaskedLeastSquares
from optprune.report import Event
from optprune.solvers import ConjugateGradients, solve
from optprune.solvers.inverse import entry_costs, entry_costs_work
from optprune.work import Work

MOST_COSTS = 1 << 22
"""the costs of single weights that are held for the whole model: of more, every k-th in sorted order is held"""


@final
@dataclass(frozen=True)
class WeightBudget(CostBudget):
    """Budget of single weights: those with the lowest cost of removal S_ii w_ij^2 / (2 (A^-1)_jj) are removed.

    A layer keeps a share between `least` and `most` of its weights (or between half the average and half way from the
    average to all, where that is wider). Where a pattern allows one share only, such as N:M, the budget decides which
    layers stay dense.
    """

    family: PatternFamily
    sparsity: float
    least: float
    most: float

    def check(self, decoder: Decoder) -> None:
        return

    def changes(self, targets: Sequence[Target]) -> int:
        return 1

    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        return WeightCosts(self, decoder, statistics, probe, in_nats)

    def layer_work(self, shapes: Decoder, block: int, target: Target) -> Work:
        outputs, inputs = shapes.layer(block, target.path).weight.shape
        return entry_costs_work(outputs, inputs)

    def step(self, shapes: Decoder) -> float:
        # Where a pattern allows one share only, a layer has it or stays dense.
        if self.family.only_share is None:
            return 1.0
        places = [(block, path) for block in range(len(shapes.blocks)) for path in shapes.paths(block)]
        return (1 - self.family.only_share) * max(shapes.layer(*place).weight.numel() for place in places)

    def held_bytes(self, decoder: Decoder) -> int:
        # The costs, and the copies that are sorted.
        return 5 * 4 * min(MOST_COSTS, decoder.linear_weights())


class WeightCosts(Costs):
    """Costs of the weights of each layer, or the curve of its two choices, by its full name."""

    def __init__(
        self, budget: WeightBudget, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool
    ) -> None:
        self.budget, self.decoder, self.probe, self.in_nats = budget, decoder, probe, in_nats
        self.statistics = statistics
        self.stride = max(1, math.ceil(decoder.linear_weights() / MOST_COSTS))
        self.every: dict[str, Tensor] = {}
        self.curves: dict[str, Curve] = {}
        self.tokens = 0
        """the largest number of tokens of a layer"""
        self.names: list[str] = []
        """the layers of the current block"""
        self.changes: list[Change] = []
        """the layers of the current block without the weights that a uniform share would remove, for the probe"""
        self.predicted = 0.0
        """the sum of the losses of those changes"""
        self.tried: list[tuple[list[str], float]] = []
        """the changes that the probe has tried, by block: the layers, and the sum of their losses"""

    def add(self, block: int, target: Target, loss: LayerLoss) -> None:
        budget, name = self.budget, self.decoder.name(block, target.path)
        self.names.append(name)
        self.tokens = max(self.tokens, loss.moments.tokens)
        part = loss.moments.tokens / self.tokens  # an expert's loss is a mean over its own tokens
        if budget.family.only_share is None and self.probe is None:
            self.every[name] = part * self.statistics.entries(loss, self.stride, lambda: self._some(entry_costs(loss)))
            return
        entries = part * entry_costs(loss)
        if budget.family.only_share is None:
            self.every[name] = self._some(entries)
        else:
            self.curves[name] = _curve(entries, budget.family, budget.family.only_share)
        if self.probe is not None:
            # The weights with the lowest costs are removed, and the others refitted.
            outputs, inputs = entries.shape
            mask = budget.family.of(outputs, inputs, 1 - budget.sparsity).project(entries)
            value = solve(MaskedLeastSquares(loss.plain, mask), ConjugateGradients(1e-2)).value
            self.predicted += part * loss.value(value)
            self.changes.append(Change.of(self.decoder.layer(block, target.path), value, loss))

    def _some(self, entries: Tensor) -> Tensor:
        """Return every `stride`-th of a layer's costs, sorted."""
        # A copy: a slice would keep all of them in memory.
        return in_order(entries.flatten())[self.stride // 2 :: self.stride].clone().cpu()

    def close(self) -> None:
        if self.probe is not None:
            self.probe.try_out(self.changes)
            self.tried.append((self.names, self.predicted))
        self.names, self.changes, self.predicted = [], [], 0.0

    def _rescale(self, divergences: Sequence[float]) -> None:
        for (names, predicted), measured in zip(self.tried, divergences, strict=True):
            rate = rate_of(measured, predicted, self.in_nats)
            for name in names:
                if name in self.curves:
                    self.curves[name] = replace(self.curves[name], errors=rate * self.curves[name].errors)
                else:
                    self.every[name] *= rate

    def allocation(self, on_event: Callable[[Event], None], begins: float = 0.0) -> Allocation:
        if self.probe is not None:
            self._rescale(self.divergences(self.probe, on_event, begins))
        decoder, share = self.decoder, self._shares()
        return Allocation.of(
            decoder,
            (
                BlockAllocation(shape, {path: share[decoder.name(index, path)] for path in decoder.paths(index)})
                for index, shape in enumerate(decoder.shapes())
            ),
        )

    def _shares(self) -> dict[str, float]:
        """Return the share that each layer keeps of its weights."""
        left, only = 1 - self.budget.sparsity, self.budget.family.only_share
        if only is not None:
            budget = left * self.decoder.linear_weights()
            chosen = fill_budget(self.curves, share_budget(self.curves, budget), budget)
            return {name: only if choice == 0 else 1.0 for name, choice in chosen.items()}
        keep = round(left * sum(cost.numel() for cost in self.every.values()))
        # Whatever the sparsity, the limits leave room on both sides of the average.
        least, most = min(self.budget.least, left / 2), max(self.budget.most, 1 - self.budget.sparsity / 2)
        # At least one weight of each layer stays.
        kept = global_threshold(self.every, keep, max(least, 1e-12), most)
        return {name: kept[name] / cost.numel() for name, cost in self.every.items()}


def _curve(costs: Tensor, family: PatternFamily, share: float) -> Curve:
    """Return the curve of two choices: the pattern, at the sum of its single costs, or all weights."""
    outputs, inputs = costs.shape
    lost = float(costs[~family.of(outputs, inputs, share).project(costs)].sum())
    prices = torch.tensor([family.keep(outputs, inputs, share), costs.numel()])
    return Curve(prices, torch.tensor([lost, 0.0], dtype=torch.float64))
