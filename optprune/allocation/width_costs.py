"""Costs of units, and the budget that they divide: the number of units of each unit kind that each block keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self, final

import numpy as np
import torch

from optprune.allocation.allocation import Allocation
from optprune.allocation.by_cost import CostBudget, Costs, rate_of
from optprune.allocation.currency import Prices, check_tokens, prices_of
from optprune.allocation.knapsack import Curve, fill_budget, share_budget
from optprune.calibration import Change, DenseStatistics, Probe
from optprune.errors import InputError
from optprune.models import BlockAllocation, Decoder, LinkedUnits, Target, Units
from optprune.problems import LayerLoss, MaskedLeastSquares, StructuredLeastSquares
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.solvers import Restore, nested_basis
from optprune.solvers.greedy_obs import removal_curve_work
from optprune.solvers.run import answer
from optprune.solvers.value_basis import best_basis_work
from optprune.work import Work

TIMING = 0.8
"""the approximate share of the work of a budget in time that is done when the times of widths are measured"""


@final
@dataclass(frozen=True)
class WidthBudget(CostBudget):
    """Budget of units: each layer has a cost curve by greedy elimination, down to no units where `least` is zero.

    The budget, in weights, operations or time, is spent where it lowers the sum of losses most, along the lower convex
    hulls of the curves; the rest is spent on single steps.
    """

    units: Units
    sparsity: float
    least: float
    """the least share of its units that a layer keeps"""
    multiple: int | None
    currency: str
    """the quantity that the sparsity is a share of: parameters, flops or time"""
    tokens: int
    """the tokens of the forward pass whose operations or time are counted"""

    def check(self, decoder: Decoder) -> None:
        """Raise InputError where the shapes alone show that the budget is out of reach; they cannot for a time."""
        self.units.check_multiple(decoder.shapes(), self.multiple, alike=False)
        asked = [] if self.multiple is None else [(kind.field, self.multiple) for kind in self.units.kinds]
        for field, multiple in asked:
            decoder.architecture.check_kept(field, multiple, f"{field} is to be a multiple of {multiple}")
        if self.currency != "parameters":
            check_tokens(decoder, self.tokens)
        if self.currency == "time":
            return
        prices, most = prices_of(decoder, self.currency, self.tokens, self.units.kinds), dict[tuple[int, str], float]()
        for index, shape in enumerate(decoder.shapes()):
            for kind in self.units.kinds:
                there, multiple = kind.there(shape), kind.multiple(shape, self.multiple)
                fewest = min(multiple * math.ceil(self.least * there / multiple), there)
                if not fewest and kind.by_rows:
                    if any(other.part == kind.part and other is not kind for other in self.units.kinds):
                        continue  # the sub-block can go as a whole
                    fewest = multiple
                saved = prices.whole[index] - prices.narrowed(index, kind, fewest)
                most[index, kind.rivals] = max(most.get((index, kind.rivals), 0.0), saved)
        self.check_most(sum(most.values()) / sum(prices.whole), prices.unit)

    def check_most(self, most: float, unit: str) -> None:
        """Raise InputError where the sparsity exceeds `most`, the share of the model that can be removed."""
        if self.sparsity > most:
            raise InputError(
                f"a sparsity of {self.sparsity:g} is out of reach with units {self.units.name!r} and allocation.least "
                f"{self.least:g}: at most {most:.1%} of {unit} can be removed"
            )

    def changes(self, targets: Sequence[Target]) -> int:
        # The units of each kind, and each sub-block that may be removed whole.
        kinds = {target.kind for target in targets if target.kind is not None}
        return len(kinds) + (0 if self.least else len({kind.part for kind in kinds if not kind.by_rows}))

    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        return WidthCosts(self, decoder, statistics, probe, in_nats)

    def step(self, shapes: Decoder) -> float:
        steps = (
            shapes.weights_of(kind.with_count(shape, more)) - shapes.weights_of(kind.with_count(shape, more - multiple))
            for shape in shapes.shapes()
            for kind in self.units.kinds
            for multiple in (kind.multiple(shape, self.multiple),)
            # The last multiple may take the whole sub-block with it.
            for more in (kind.there(shape), multiple)
            if kind.there(shape) >= more >= multiple and (more > multiple or not self.least)
        )
        return max(steps, default=0)

    def layer_work(self, shapes: Decoder, block: int, target: Target) -> Work:
        assert target.kind is not None
        multiple = target.kind.multiple(shapes.shape(block), self.multiple)
        outputs, inputs = target.sizes(shapes.layer(block, target.path))
        curve = removal_curve_work(outputs, inputs, multiple)
        return curve + best_basis_work(outputs, inputs) if target.kind.rotated else curve


@dataclass(frozen=True, eq=False)
class WidthCurve:
    """Loss of a block for each number of units of one kind that it may keep."""

    block: int
    kind: LinkedUnits
    there: int
    """the number of units, in every slot"""
    losses: Mapping[int, float]
    """the loss by the number of units kept, which is less than all; with zero the sub-block is removed"""
    in_nats: bool = False
    """whether losses are already in nats, the unit of a probe"""

    @property
    def part(self) -> tuple[int, str]:
        """The block and the name of its rival kinds: a sub-block, which may have units of several, or "pairs"."""
        return self.block, self.kind.rivals

    def rescaled(self, measured: Mapping[int, float]) -> "WidthCurve":
        """Return the curve rescaled to a probe's divergences at some numbers of units, interpolated between."""
        if not measured:
            return self
        counts = sorted(measured)
        rates = [rate_of(measured[count], self.losses[count], self.in_nats) for count in counts]
        losses = {count: float(np.interp(count, counts, rates)) * lost for count, lost in self.losses.items()}
        if 0 in measured:  # no rate turns a loss of zero into the divergence
            losses[0] = measured[0]
        return replace(self, losses=losses)

    def kept(self, least: float, prices: Prices) -> "list[Kept]":
        """Return the choices that keep at least the share `least` of the units, up to all of them."""
        every, whole = {self.there: 0.0, **self.losses}, prices.whole[self.block]
        counts = sorted(count for count in every if count >= least * self.there)
        saved = {count: whole - prices.narrowed(self.block, self.kind, count) for count in counts}
        return [Kept(self.kind, count, saved[count], every[count]) for count in counts]


@dataclass(frozen=True)
class Kept:
    """Choice among rival kinds: units of one kind that stay, with all of the others; with none a sub-block goes."""

    kind: LinkedUnits
    count: int
    saved: float
    """the part of the budget that is saved"""
    loss: float


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices of a sub-block, sorted by what they save, the most first; no two save the same."""

    part: tuple[int, str]
    kept: tuple[Kept, ...]

    @classmethod
    def of(cls, widths: Sequence[WidthCurve], least: float, prices: Prices) -> Self:
        """Return the choices of all unit kinds of one sub-block; of two that save the same, the better one."""
        every = [kept for width in widths for kept in width.kept(least, prices)]
        every.sort(key=lambda kept: (-kept.saved, kept.loss))
        better = [after for before, after in pairwise(every) if after.saved < before.saved]
        return cls(widths[0].part, (every[0], *better))

    @property
    def curve(self) -> Curve:
        """The losses of the choices by their prices, which are negative: the savings."""
        prices = torch.tensor([-kept.saved for kept in self.kept], dtype=torch.float64)
        return Curve(prices, torch.tensor([kept.loss for kept in self.kept], dtype=torch.float64))

    def present(self) -> "Choices":
        """Return the choices that keep the sub-block."""
        return replace(self, kept=tuple(kept for kept in self.kept if kept.count))


def most_saved(choices: Sequence[Choices]) -> float:
    """Return the savings where every sub-block keeps the least."""
    return sum(each.kept[0].saved for each in choices)


def least_lost(choices: Sequence[Choices], due: float) -> dict[tuple[int, str], Kept]:
    """Return the choice of each sub-block that saves `due` at a small loss: see `share_budget` and `fill_budget`."""
    curves = {f"{block} {part}": each.curve for each in choices for block, part in (each.part,)}
    chosen = fill_budget(curves, share_budget(curves, -due), -due)
    return {each.part: each.kept[choice] for each, choice in zip(choices, chosen.values(), strict=True)}


@dataclass(frozen=True, eq=False)
class _Layer:
    """Losses of one layer of a block without its units."""

    losses: Mapping[int, float]
    """the loss of a token that reaches the layer, by the number of units kept"""
    tokens: int
    """the tokens that reach the layer"""
    tried: tuple[int, Change] | None
    """the probe's number of units, and the layer with that many"""


class WidthCosts(Costs):
    """Cost curves of every block and unit kind, of a layer or of all experts, which keep equally many units."""

    def __init__(
        self, budget: WidthBudget, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool
    ) -> None:
        self.budget, self.decoder, self.probe, self.in_nats = budget, decoder, probe, in_nats
        self.statistics = statistics
        self.widths: list[WidthCurve] = []
        self.present: dict[tuple[int, LinkedUnits], list[_Layer]] = {}
        """the layers of the current block"""
        self.tried: list[tuple[tuple[int, str], LinkedUnits | None, int]] = []
        """the changes that the probe has tried: sub-block, unit kind (None: the sub-block is removed), units kept"""
        self.noted: dict[str, list[str]] = {}
        """the names of the layers that each note concerns"""
        self.saves = ""
        """the part of the budget that the allocation saves, where it is not counted in weights"""

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
        layer, notes = self._layer(block, target, target.kind, loss)
        for note in notes:
            self.noted.setdefault(note, []).append(self.decoder.name(block, target.path))
        self.present.setdefault((block, target.kind), []).append(layer)

    def close(self) -> None:
        for (block, kind), layers in self.present.items():
            width = self._curve(block, kind, layers)
            self.widths.append(width)
            if self.probe is not None:
                self._try_out(self.probe, width, [layer.tried for layer in layers if layer.tried is not None])
        self.present.clear()

    def _layer(self, block: int, target: Target, kind: LinkedUnits, loss: LayerLoss) -> tuple[_Layer, tuple[str, ...]]:
        """Return the losses of one layer by greedy elimination of its units, a multiple at a time, with notes."""
        shape, channels = self.decoder.shape(block), kind.linked(self.decoder, block, target.path).channels
        there, slots, multiple = kind.there(shape), channels.slot_count, kind.multiple(shape, self.budget.multiple)
        rotation = nested_basis(loss, channels) if kind.rotated else None
        stated = loss if rotation is None else rotation.loss(loss)
        order, losses, notes = self.statistics.removal(
            StructuredLeastSquares(stated.whitened(), channels, channels.units), multiple
        )
        # Entry removed * slots - 1 is the loss after every slot has lost `removed` units.
        after = {there - removed: loss for removed, loss in enumerate(losses[slots - 1 :: slots].tolist(), start=1)}
        # Without pairs there would be no scores, so some stay.
        found = {count: loss for count, loss in after.items() if count % multiple == 0 and (count or not kind.by_rows)}
        tried = None
        between = [count for count in found if count]
        if self.probe is not None and between:
            count = min(between, key=lambda count: abs(count - (1 - self.budget.sparsity) * there))
            kept = torch.ones(channels.units, dtype=torch.bool, device=order.device)
            kept[order[: (there - count) * slots]] = False
            restored = MaskedLeastSquares(stated.plain, channels.column_mask(kept, loss.weight.shape[1]))
            value = answer(restored, Restore(), restored.start())
            value = value if rotation is None else rotation.back(value)
            own = self.decoder.layer(block, target.path)
            weight, bias = target.read(value, loss, own)
            tried = count, Change(own, weight.to(own.weight.dtype), bias)
        return _Layer(found, loss.moments.tokens, tried), notes

    def _curve(self, block: int, kind: LinkedUnits, layers: list[_Layer]) -> WidthCurve:
        """Return the losses of a block for a token, which reaches some of the layers."""
        reached = 1 if len(layers) == 1 else self.decoder.experts_for_a_token
        tokens = sum(layer.tokens for layer in layers) / reached
        losses = {
            count: sum(layer.tokens / tokens * layer.losses[count] for layer in layers) for count in layers[0].losses
        }
        return WidthCurve(block, kind, kind.there(self.decoder.shape(block)), losses, self.in_nats)

    def _try_out(self, probe: Probe, width: WidthCurve, tried: list[tuple[int, Change]]) -> None:
        """Try the layers of a block with fewer units, together, and the block without the sub-block."""
        if tried:
            probe.try_out([change for _, change in tried])
            self.tried.append((width.part, width.kind, tried[0][0]))
        part = width.block, width.kind.part
        if not self.budget.least and 0 in width.losses and (part, None, 0) not in self.tried:
            probe.try_without(*part)
            self.tried.append((part, None, 0))

    def _rescale(self, divergences: Sequence[float]) -> None:
        found = list(zip(self.tried, divergences, strict=True))
        self.widths = [
            width.rescaled(
                {
                    count: measured
                    for (part, kind, count), measured in found
                    if part == width.part and kind in (None, width.kind)
                }
            )
            for width in self.widths
        ]

    def allocation(self, on_event: Callable[[Event], None], begins: float = 0.0) -> Allocation:
        budget, shapes = self.budget, list(self.decoder.shapes())
        if self.probe is not None:
            self._rescale(self.divergences(self.probe, on_event, begins))

        def on_timed(done: int, total: int) -> None:
            on_event(PhaseAdvanced(BUDGET, "measuring the time of narrower blocks", "width", done, total, TIMING))

        # Prices of the model in its own dtype, as it will be used.
        stored = self.decoder.as_stored()
        prices = prices_of(stored, budget.currency, budget.tokens, budget.units.kinds, on_timed)
        chosen = self._chosen(prices)
        for (block, _), kept in chosen.items():
            shapes[block] = kept.kind.with_count(shapes[block], kept.count)
        saved = sum(kept.saved for kept in chosen.values()) / sum(prices.whole)
        self.saves = "" if budget.currency == "parameters" else f"{saved:.2%} of {prices.unit}"
        return Allocation.of(self.decoder, map(BlockAllocation, shapes), self.saves)

    def _chosen(self, prices: Prices) -> dict[tuple[int, str], Kept]:
        """Return the choice of each sub-block.

        Where a sub-block has units of several kinds, the greedy division may lose more than one without one of them:
        the best is returned.
        """
        kinds, total = list(dict.fromkeys(width.kind for width in self.widths)), sum(prices.whole)
        due = self.budget.sparsity * total
        several = [kind for kind in kinds if any(kind != other and kind.part == other.part for other in kinds)]
        fewer = [self._choices([other for other in kinds if other != kind], prices) for kind in several]
        ways = [self._choices(kinds, prices), *(choices for choices in fewer if most_saved(choices) >= due)]
        found = [self._divided(choices, due, total, prices.unit) for choices in ways]
        return min(found, key=lambda chosen: sum(kept.loss for kept in chosen.values()))

    def _divided(self, choices: list[Choices], due: float, total: float, unit: str) -> dict[tuple[int, str], Kept]:
        """Return the choice of each sub-block that saves `due` together; InputError where no choices save as much."""
        self.budget.check_most(most_saved(choices) / total, unit)
        chosen = least_lost(choices, due)
        gone = {block for (block, part), kept in chosen.items() if part == "attention" and not kept.count}
        pairs = [each for each in choices if each.part[1] == "pairs" and each.part[0] in gone and len(each.kept) > 1]
        if pairs:
            # What goes with the attention saves nothing more.
            left = [replace(each, kept=each.kept[-1:]) if each in pairs else each for each in choices]
            return self._divided(left, due, total, unit)
        attention = [each for each in choices if each.part[1] == "attention"]
        if attention and not any(chosen[each.part].count for each in attention):
            # At least one attention must stay, so the most costly one does.
            dearest = max(attention, key=lambda each: each.kept[0].loss)
            left = [each.present() if each is dearest else each for each in choices]
            return self._divided(left, due, total, unit)
        return chosen

    def _choices(self, kinds: Sequence[LinkedUnits], prices: Prices) -> list[Choices]:
        """Return the choices of each sub-block among some unit kinds."""
        parts: dict[tuple[int, str], list[WidthCurve]] = {}
        for width in self.widths:
            if width.kind in kinds:
                parts.setdefault(width.part, []).append(width)
        return [Choices.of(widths, self.budget.least, prices) for widths in parts.values()]
