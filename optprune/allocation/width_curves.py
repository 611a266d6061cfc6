"""What blocks lose for each number of units that they keep, and the choices of a sub-block among kinds of units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
import torch

from optprune.allocation.costs import rate_of
from optprune.allocation.currency import Prices
from optprune.allocation.knapsack import Curve, fill_budget, share_budget
from optprune.models import LinkedUnits


@dataclass(frozen=True, eq=False)
class WidthCurve:
    """The loss of a block for each number of units of one kind that it may keep."""

    block: int
    kind: LinkedUnits
    there: int
    """how many units there are, in every slot"""
    losses: Mapping[int, float]
    """the loss by the number of units kept, which is not all; zero is the block without that sub-block"""
    in_nats: bool = False
    """whether losses are already in the unit of a probe"""

    @property
    def part(self) -> tuple[int, str]:
        """The sub-block: units of several kinds may be its."""
        return self.block, self.kind.part

    def put_right(self, measured: Mapping[int, float]) -> "WidthCurve":
        """The curve scaled to what a probe measured at some numbers of units: by the rate between two of them."""
        if not measured:
            return self
        counts = sorted(measured)
        rates = [rate_of(measured[count], self.losses[count], self.in_nats) for count in counts]
        losses = {count: float(np.interp(count, counts, rates)) * lost for count, lost in self.losses.items()}
        if 0 in measured:  # a rate cannot make something of a loss of nothing
            losses[0] = measured[0]
        return replace(self, losses=losses)

    def kept(self, least: float, prices: Prices) -> "list[Kept]":
        """What may be kept of the units, a share `least` of all or more, with all of them."""
        every, whole = {self.there: 0.0, **self.losses}, prices.whole[self.block]
        counts = sorted(count for count in every if count >= least * self.there)
        saved = {count: whole - prices.narrowed(self.block, self.kind, count) for count in counts}
        return [Kept(self.kind, count, saved[count], every[count]) for count in counts]


@dataclass(frozen=True)
class Kept:
    """A number of units of one kind that a sub-block keeps, of all other kinds all; with none it is gone."""

    kind: LinkedUnits
    count: int
    saved: float
    """what that saves of the budget"""
    loss: float


@dataclass(frozen=True, eq=False)
class Choices:
    """What a sub-block may keep, the most that is saved first; no two save the same."""

    part: tuple[int, str]
    kept: tuple[Kept, ...]

    @classmethod
    def of(cls, widths: Sequence[WidthCurve], least: float, prices: Prices) -> Self:
        """The choices of all kinds of units of one sub-block together; of two that save the same, the better one."""
        every = [kept for width in widths for kept in width.kept(least, prices)]
        every.sort(key=lambda kept: (-kept.saved, kept.loss))
        better = [after for before, after in pairwise(every) if after.saved < before.saved]
        return cls(widths[0].part, (every[0], *better))

    @property
    def curve(self) -> Curve:
        """The losses of the choices by their prices, which are below zero: what is saved."""
        prices = torch.tensor([-kept.saved for kept in self.kept], dtype=torch.float64)
        return Curve(prices, torch.tensor([kept.loss for kept in self.kept], dtype=torch.float64))

    def standing(self) -> "Choices":
        """Those that leave the sub-block there."""
        return replace(self, kept=tuple(kept for kept in self.kept if kept.count))


def most_saved(choices: Sequence[Choices]) -> float:
    """What is saved where every sub-block keeps the least."""
    return sum(each.kept[0].saved for each in choices)


def least_lost(choices: Sequence[Choices], due: float) -> dict[tuple[int, str], Kept]:
    """What each sub-block keeps so that `due` is saved and little is lost: see `share_budget` and `fill_budget`."""
    curves = {f"{block} {part}": each.curve for each in choices for block, part in (each.part,)}
    chosen = fill_budget(curves, share_budget(curves, -due), -due)
    return {each.part: each.kept[choice] for each, choice in zip(choices, chosen.values(), strict=True)}
