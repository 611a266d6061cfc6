"""What units cost, and one budget divided by that: how many of them each block keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from optprune.allocation.allocation import Allocation
from optprune.allocation.costs import CostBudget, Costs
from optprune.allocation.currency import Prices, check_tokens, prices_of
from optprune.allocation.uniform import check_multiple
from optprune.allocation.width_curves import Choices, Kept, WidthCurve, least_lost, most_saved
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
        check_multiple(self.units, decoder.shapes(), self.multiple, alike=False)
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
                saved = prices.whole[index] - prices.narrowed(index, kind, fewest)
                most[index, kind.part] = max(most.get((index, kind.part), 0.0), saved)
        self.check_most(sum(most.values()) / sum(prices.whole), prices.unit)

    def check_most(self, most: float, unit: str) -> None:
        """Raise InputError unless a share of the model that can go is enough."""
        if self.sparsity > most:
            raise InputError(
                f"a sparsity of {self.sparsity:g} is out of reach with units {self.units.name!r} and allocation.least "
                f"{self.least:g}: at most {most:.1%} of {unit} can go"
            )

    def changes(self, targets: Sequence[Target]) -> int:
        # The units of each kind, and each sub-block that may go whole.
        kinds = {target.kind for target in targets if target.kind is not None}
        return len(kinds) + (0 if self.least else len({kind.part for kind in kinds}))

    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        return WidthCosts(self, decoder, statistics, probe, in_nats)


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one layer of a block loses without its units."""

    losses: Mapping[int, float]
    """the loss for a token that reaches it, by the number of units kept"""
    tokens: int
    """the tokens that reach it"""
    tried: tuple[int, Change] | None
    """what the probe tries: with how many units, and the layer then"""


class WidthCosts(Costs):
    """The curve of every block by each kind of units: of a layer, or of all experts, which keep equally many."""

    def __init__(
        self, budget: WidthBudget, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool
    ) -> None:
        self.budget, self.decoder, self.probe, self.in_nats = budget, decoder, probe, in_nats
        self.statistics = statistics
        self.widths: list[WidthCurve] = []
        self.present: dict[tuple[int, LinkedUnits], list[_Layer]] = {}
        """the layers of the present block"""
        self.tried: list[tuple[tuple[int, str], LinkedUnits | None, int]] = []
        """what the probe has tried: the sub-block, the kind of units (None where it is gone), and how many it kept"""
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
        """The losses of one layer by greedy elimination of its units, a multiple at a time, and notes on that."""
        shape, link = self.decoder.shape(block), kind.linked(self.decoder, block, target.path).link
        there, slots, multiple = kind.there(shape), link.slot_count, kind.multiple(shape, self.budget.multiple)
        rotation = nested_basis(loss, link) if kind.rotated else None
        stated = loss if rotation is None else rotation.loss(loss)
        order, losses, notes = self.statistics.removal(
            LinkedLeastSquares(stated.whitened(), link, link.units), multiple
        )
        # Entry gone * slots - 1 is the loss once every slot has lost `gone` units.
        after = {there - gone: loss for gone, loss in enumerate(losses[slots - 1 :: slots].tolist(), start=1)}
        found, tried = {count: loss for count, loss in after.items() if count % multiple == 0}, None
        between = [count for count in found if count]
        if self.probe is not None and between:
            count = min(between, key=lambda count: abs(count - (1 - self.budget.sparsity) * there))
            kept = torch.ones(link.units, dtype=torch.bool, device=order.device)
            kept[order[: (there - count) * slots]] = False
            restored = MaskedLeastSquares(stated.plain, link.column_mask(kept, loss.weight.shape[1]))
            value = answer(restored, Restore(), restored.start())
            value = value if rotation is None else rotation.back(value)
            tried = count, Change.of(self.decoder.layer(block, target.path), value, loss)
        return _Layer(found, loss.moments.tokens, tried), notes

    def _curve(self, block: int, kind: LinkedUnits, layers: list[_Layer]) -> WidthCurve:
        """The losses of a block for a token that goes through it, which reaches some of the layers."""
        reached = 1 if len(kind.consumers(self.decoder.architecture)) == 1 else self.decoder.experts_for_a_token
        tokens = sum(layer.tokens for layer in layers) / reached
        losses = {
            count: sum(layer.tokens / tokens * layer.losses[count] for layer in layers) for count in layers[0].losses
        }
        return WidthCurve(block, kind, kind.there(self.decoder.shape(block)), losses, self.in_nats)

    def _try_out(self, probe: Probe, width: WidthCurve, tried: list[tuple[int, Change]]) -> None:
        """Have the layers of a block with fewer units tried, together, and the block without the sub-block."""
        if tried:
            probe.try_out([change for _, change in tried])
            self.tried.append((width.part, width.kind, tried[0][0]))
        if not self.budget.least and (width.part, None, 0) not in self.tried:
            probe.try_without(width.block, width.kind.part)
            self.tried.append((width.part, None, 0))

    def _put_right(self, divergences: Sequence[float]) -> None:
        found = list(zip(self.tried, divergences, strict=True))
        self.widths = [
            width.put_right(
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
            self._put_right(self.divergences(self.probe, on_event, begins))

        def on_timed(done: int, total: int) -> None:
            on_event(PhaseAdvanced(BUDGET, "measuring the time of narrower blocks", "width", done, total, TIMING))

        # Of the model as it will be used, in its own dtype.
        stored = self.decoder.as_stored()
        prices = prices_of(stored, budget.currency, budget.tokens, budget.units.kinds, on_timed)
        chosen = self._chosen(prices)
        for (block, _), kept in chosen.items():
            shapes[block] = kept.kind.with_count(shapes[block], kept.count)
        saved = sum(kept.saved for kept in chosen.values()) / sum(prices.whole)
        self.saves = "" if budget.currency == "parameters" else f"{saved:.2%} of {prices.unit}"
        return Allocation.of(self.decoder, map(BlockAllocation, shapes), self.saves)

    def _chosen(self, prices: Prices) -> dict[tuple[int, str], Kept]:
        """What each sub-block keeps.

        Where kinds of units compete, the greedy division may come to more than without one of them: the least is taken.
        """
        kinds, total = list(dict.fromkeys(width.kind for width in self.widths)), sum(prices.whole)
        due = self.budget.sparsity * total
        rivals = [kind for kind in kinds if any(kind != other and kind.part == other.part for other in kinds)]
        fewer = [self._choices([other for other in kinds if other != kind], prices) for kind in rivals]
        ways = [self._choices(kinds, prices), *(choices for choices in fewer if most_saved(choices) >= due)]
        found = [self._divided(choices, due, total, prices.unit) for choices in ways]
        return min(found, key=lambda chosen: sum(kept.loss for kept in chosen.values()))

    def _divided(self, choices: list[Choices], due: float, total: float, unit: str) -> dict[tuple[int, str], Kept]:
        """What each sub-block keeps of its choices, so that so much is saved; InputError where that is too much."""
        self.budget.check_most(most_saved(choices) / total, unit)
        chosen = least_lost(choices, due)
        attention = [each for each in choices if each.part[1] == "attention"]
        if attention and not any(chosen[each.part].count for each in attention):
            # Without any attention no token would see another: the dearest stays.
            dearest = max(attention, key=lambda each: each.kept[0].loss)
            left = [each.standing() if each is dearest else each for each in choices]
            return self._divided(left, due, total, unit)
        return chosen

    def _choices(self, kinds: Sequence[LinkedUnits], prices: Prices) -> list[Choices]:
        """The choices of each sub-block among some kinds of units."""
        parts: dict[tuple[int, str], list[WidthCurve]] = {}
        for width in self.widths:
            if width.kind in kinds:
                parts.setdefault(width.part, []).append(width)
        return [Choices.of(widths, self.budget.least, prices) for widths in parts.values()]
