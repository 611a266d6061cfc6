"""What units cost, and one budget divided by that: how many of them each block keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from optprune.allocation.allocation import Allocation
from optprune.allocation.costs import CostBudget, Costs, rate_of
from optprune.allocation.currency import Prices, check_tokens, prices_of
from optprune.allocation.knapsack import Curve, fill_budget, share_budget
from optprune.calibration import Change, DenseStatistics, Probe
from optprune.errors import InputError
from optprune.models import BlockAllocation, Decoder, LinkedUnits, Target, Units
from optprune.problems import LayerLoss, LinkedLeastSquares, MaskedLeastSquares
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.solvers import Restore, nested_basis
from optprune.solvers.run import answer

TIMING = 0.8
"""the share of the work of a budget in time that is done, roughly, when the times of widths are measured"""


@dataclass(frozen=True, eq=False)
class WidthCurve:
    """The loss of a block for each number of units of one kind that it may keep."""

    block: int
    kind: LinkedUnits
    there: int
    """how many units there are, in every slot"""
    losses: Mapping[int, float]
    """the loss by the number of units kept, which is not all; zero is the block without that sub-block"""
    notes: tuple[str, ...] = ()
    tried: int | None = None
    """the number of units kept that a probe has tried"""
    in_nats: bool = False
    """whether losses are already in the probe's unit"""

    def put_right(self, measured: float) -> "WidthCurve":
        """The curve scaled to what a probe measured."""
        assert self.tried is not None
        rate = rate_of(measured, self.losses[self.tried], self.in_nats)
        return replace(self, losses={count: rate * lost for count, lost in self.losses.items()})

    def curve(self, least: float, prices: Prices) -> tuple[list[int], Curve]:
        """The numbers of units from a share `least` of all, and the curve of their losses by what is saved, below 0."""
        every = {self.there: 0.0, **self.losses}
        counts = sorted(count for count in every if count >= least * self.there)
        saved = [prices.narrowed(self.block, self.kind, count) - prices.whole[self.block] for count in counts]
        losses = torch.tensor([every[count] for count in counts], dtype=torch.float64)
        return counts, Curve(torch.tensor(saved, dtype=torch.float64), losses)


@final
@dataclass(frozen=True)
class WidthBudget(CostBudget):
    """Units: each layer's whole error curve by greedy elimination, down to nothing where `least` is zero.

    The budget, in weights, operations or time, goes where it lowers the sum most, along the lower convex hulls; what is
    left then goes to single steps.
    """

    units: Units
    sparsity: float
    least: float
    """the least share of its units that a layer keeps"""
    multiple: int | None
    currency: str
    """what the sparsity is a share of: parameters, flops or time"""
    tokens: int
    """the tokens of the forward pass that operations and time are of"""

    def check(self, decoder: Decoder) -> None:
        """Raise InputError where the shapes alone say that the budget is out of reach, which they do not of a time."""
        if self.currency != "parameters":
            check_tokens(decoder, self.tokens)
        if self.currency == "time":
            return
        prices, saved = prices_of(decoder, self.currency, self.tokens, self.units.kinds), 0.0
        for index, shape in enumerate(decoder.shapes()):
            for kind in self.units.kinds:
                there, multiple = kind.there(shape), kind.multiple(shape, self.multiple)
                fewest = min(multiple * math.ceil(self.least * there / multiple), there)
                saved += prices.whole[index] - prices.narrowed(index, kind, fewest)
        self.check_most(saved / sum(prices.whole), prices.unit)

    def check_most(self, most: float, unit: str) -> None:
        """Raise InputError unless a share of the model that can go is enough."""
        if self.sparsity > most:
            raise InputError(
                f"a sparsity of {self.sparsity:g} is out of reach with units {self.units.name!r} and least_kept "
                f"{self.least:g}: at most {most:.1%} of {unit} can go"
            )

    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        return WidthCosts(self, decoder, statistics, probe)


class WidthCosts(Costs):
    """The curve of every layer whose columns are units."""

    def __init__(self, budget: WidthBudget, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None) -> None:
        self.budget, self.decoder, self.statistics, self.probe = budget, decoder, statistics, probe
        self.widths: list[WidthCurve] = []
        self.noted: dict[str, list[str]] = {}
        """the names of the layers that each note is about"""
        self.saves = ""
        """what the allocation saves, where that is not counted in weights"""

    @property
    def warnings(self) -> tuple[str, ...]:
        more = {note: f" and {len(names) - 1} more" if len(names) > 1 else "" for note, names in self.noted.items()}
        return tuple(f"{names[0]}{more[note]}: {note}" for note, names in self.noted.items())

    @property
    def notes(self) -> tuple[str, ...]:
        note = f"the budget was counted in {self.budget.currency}: the allocation saves {self.saves}"
        return (note,) if self.saves else ()

    def add(self, block: int, target: Target, loss: LayerLoss) -> None:
        assert target.kind is not None
        width = self._curve(block, target.kind, loss)
        for note in width.notes:
            self.noted.setdefault(note, []).append(self.decoder.name(block, target.path))
        self.widths.append(width)

    def close(self) -> None:
        return

    def _curve(self, block: int, kind: LinkedUnits, loss: LayerLoss) -> WidthCurve:
        """The losses of one block by greedy elimination of its units, a multiple at a time."""
        shape, layers = self.decoder.shape(block), kind.layers(self.decoder, block)
        there, slots, multiple = kind.there(shape), layers.link.slot_count, kind.multiple(shape, self.budget.multiple)
        rotation = nested_basis(loss, layers.link) if kind.rotated else None
        stated = loss if rotation is None else rotation.loss(loss)
        problem = LinkedLeastSquares(stated.whitened(), layers.link, layers.link.units)
        order, losses, notes = self.statistics.removal(problem, multiple)
        # Entry gone * slots - 1 is the loss once every slot has lost `gone` units.
        after = {there - gone: loss for gone, loss in enumerate(losses[slots - 1 :: slots].tolist(), start=1)}
        allowed = {count: loss for count, loss in after.items() if count % multiple == 0}
        tried = None
        between = [count for count in allowed if count]
        if self.probe is not None and between:
            tried = min(between, key=lambda count: abs(count - (1 - self.budget.sparsity) * there))
            kept = torch.ones(layers.link.units, dtype=torch.bool, device=order.device)
            kept[order[: (there - tried) * slots]] = False
            mask = layers.link.column_mask(kept, loss.weight.shape[1])
            restored = MaskedLeastSquares(stated.plain, mask)
            value = answer(restored, Restore(), restored.start())
            value = value if rotation is None else rotation.back(value)
            self.probe.try_out([Change.of(self.decoder.layer(block, layers.consumer), value, loss)])
        return WidthCurve(block, kind, there, allowed, notes, tried, loss.metric is not None)

    def _put_right(self, divergences: Sequence[float]) -> None:
        measured = iter(divergences)
        self.widths = [width if width.tried is None else width.put_right(next(measured)) for width in self.widths]

    def allocation(self, on_event: Callable[[Event], None], begins: float = 0.0) -> Allocation:
        budget, shapes = self.budget, list(self.decoder.shapes())
        if self.probe is not None:
            self._put_right(self.divergences(self.probe, on_event, begins))

        def on_timed(done: int, total: int) -> None:
            on_event(PhaseAdvanced(BUDGET, "measuring the time of narrower blocks", "width", done, total, TIMING))

        # Of the model as it will be used, in its own dtype.
        stored = self.decoder.as_stored()
        prices = prices_of(stored, budget.currency, budget.tokens, budget.units.kinds, on_timed)
        total, counts, curves = sum(prices.whole), {}, {}
        for width in self.widths:
            name = _name(width)
            counts[name], curves[name] = width.curve(budget.least, prices)

        def choose() -> dict[str, int]:
            budget.check_most(-sum(float(curve.prices[0]) for curve in curves.values()) / total, prices.unit)
            # Prices are below zero: what is saved.
            left = -budget.sparsity * total
            return fill_budget(curves, share_budget(curves, left), left)

        chosen = choose()
        attention = [_name(width) for width in self.widths if width.kind.part == "attention"]
        if attention and not any(counts[name][chosen[name]] for name in attention):
            # Without any attention no token would see another: the dearest stays.
            dearest = max(attention, key=lambda name: float(curves[name].errors[0]))
            counts[dearest] = counts[dearest][1:]
            curves[dearest] = Curve(curves[dearest].prices[1:], curves[dearest].errors[1:])
            chosen = choose()
        for width, name in zip(self.widths, counts, strict=True):
            shapes[width.block] = width.kind.with_count(shapes[width.block], counts[name][chosen[name]])
        saved = -sum(float(curve.prices[chosen[name]]) for name, curve in curves.items()) / total
        self.saves = "" if budget.currency == "parameters" else f"{saved:.2%} of {prices.unit}"
        return Allocation.of(self.decoder, map(BlockAllocation, shapes), self.saves)


def _name(width: WidthCurve) -> str:
    return f"{width.block} {width.kind.field}"
