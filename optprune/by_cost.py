"""One budget for the whole model, divided by what each block would lose: an `Allocation` from measured costs.

The costs come from the dense model, in one pass of the calibration tokens, and are in one unit only under an output
metric: without one a layer with large outputs seems important because they are large.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from optprune.allocation import NARROWED, Allocation, BlockAllocation
from optprune.budget import Curve, fill_budget, global_threshold, share_budget
from optprune.errors import InputError, NumericalError
from optprune.memory import release
from optprune.metric import OutputMetric
from optprune.models import BlockShape, Decoder
from optprune.models.moments_pass import collect
from optprune.models.stream import Stream
from optprune.patterns import NM, in_order
from optprune.prices import Prices, prices_of, with_count
from optprune.probe import Change, Probe
from optprune.problems import LayerLoss, LinkedLeastSquares, MaskedLeastSquares
from optprune.recipe import Recipe, n_of_m, pattern_of
from optprune.report import BlockMeasured, Event, PhaseAdvanced
from optprune.solvers import ConjugateGradients, Restore, solve
from optprune.solvers.greedy_obs import removal_curve
from optprune.solvers.removal import entry_costs

MOST_COSTS = 1 << 22
"""how many costs of single weights are held for the whole model: beyond that, every k-th in order of size"""
UNHEARD = 1e-5
"""nats a token: a divergence in float32 arithmetic tells no less"""


@dataclass(frozen=True, eq=False)
class WidthCurve:
    """The loss of a block for each number of units that one field of its shape may keep."""

    block: int
    field: str
    there: int
    """how many there are"""
    losses: Mapping[int, float]
    """by the number of units kept; zero is the block without that sub-block"""
    notes: tuple[str, ...] = ()

    def curve(self, least: float, prices: Prices) -> tuple[list[int], Curve]:
        """The numbers of units from a share `least` of all, and the curve of their losses by what is saved, below 0."""
        counts = sorted(count for count in self.losses if count >= least * self.there)
        saved = [prices.narrowed(self.block, self.field, count) - prices.whole[self.block] for count in counts]
        losses = torch.tensor([self.losses[count] for count in counts], dtype=torch.float64)
        return counts, Curve(torch.tensor(saved, dtype=torch.float64), losses)


def by_cost(
    decoder: Decoder,
    stream: Stream,
    recipe: Recipe,
    metrics: Mapping[str, OutputMetric],
    on_event: Callable[[Event], None],
    probe: Probe | None = None,
) -> tuple[Allocation, tuple[str, ...]]:
    """Divide the recipe's sparsity over the whole model so that the sum of the layers' losses is least; and notes.

    Single weights: those with the lowest cost of removal S_ii w_ij^2 / (2 (A^-1)_jj) go, wherever they are, and a
    layer keeps between `least_kept` and `most_kept` of its weights (or half of the average, and half way from the
    average to all, where that is wider). N:M: which layers stay dense. Units: each layer's whole error curve by greedy
    elimination, down to nothing where `least_kept` is zero, and the budget, in weights, operations or time, goes where
    it lowers the sum most, along the lower convex hulls; what is left then goes to single steps. `stream` holds the
    inputs of the first block and goes on to the end of the model. Costs one calibration pass with its Gram products,
    and in^3 for each layer. Notes tell of layers whose Gram matrix had to be damped further.

    With a `probe` the units of each layer, or the single weights of each block, are also removed alone, down to about
    the share that all keep, and the costs are scaled to the divergence that this brings: a pass over the probe's tokens
    from that block on.
    """
    blocks = len(decoder.blocks)
    stride = max(1, math.ceil(decoder.linear_weights() / MOST_COSTS))
    costs: dict[str, Tensor] = {}
    patterned: dict[str, Curve] = {}
    widths: list[WidthCurve] = []
    noted: dict[str, list[str]] = {}
    tap = decoder.architecture.taps
    n_m = n_of_m(recipe.pattern)
    for index in range(blocks):
        on_event(PhaseAdvanced("measuring what blocks would lose", "block", index, blocks))
        trial = _Trial(recipe, probe, bool(metrics))
        wanted = decoder.paths(index) if recipe.units == "weights" else _consumers(decoder, recipe, index)
        taps = sorted({tap[path] for path in wanted}, key=decoder.architecture.layers.index)
        moments = collect(decoder.blocks[index], stream, taps, output=stream).moments
        for path in wanted:
            layer, name = decoder.layer(index, path), decoder.name(index, path)
            fit_bias = recipe.fit_bias and layer.bias is not None
            loss = LayerLoss.of(
                layer.weight, moments[tap[path]], recipe.damping, fit_bias=fit_bias, metric=metrics.get(name)
            )
            try:
                if recipe.units != "weights":
                    width = _width_curve(decoder, recipe, index, path, loss, probe)
                    for note in width.notes:
                        noted.setdefault(note, []).append(name)
                    widths.append(width)
                    continue
                entries = entry_costs(loss)
            except NumericalError as error:
                raise NumericalError(f"{name}: {error}") from error
            if n_m is not None:
                patterned[name] = _pattern_curve(entries, n_m)
            else:
                # A copy: a slice would keep all of them in memory.
                costs[name] = in_order(entries.flatten())[stride // 2 :: stride].clone().cpu()
            trial.add(layer, loss, entries)
        if probe is not None:
            if recipe.units == "weights":
                rate = trial.rate()
                for name in (decoder.name(index, path) for path in wanted):
                    if n_m is not None:
                        patterned[name] = replace(patterned[name], errors=rate * patterned[name].errors)
                    else:
                        costs[name] *= rate
            probe.advance()
        release()
        on_event(BlockMeasured(index, blocks))
    more = {note: f" and {len(names) - 1} more" if len(names) > 1 else "" for note, names in noted.items()}
    notes = tuple(f"{names[0]}{more[note]}: {note}" for note, names in noted.items())
    if recipe.units != "weights":
        return _widths(decoder, recipe, widths, on_event), notes
    return _shares(decoder, recipe, costs, patterned), notes


def _consumers(decoder: Decoder, recipe: Recipe, index: int) -> list[str]:
    """The layers whose columns the recipe's units are, in the order of the forward pass."""
    architecture, shape = decoder.architecture, decoder.shape(index)
    fields = NARROWED[recipe.units]
    paths = [architecture.output] if shape.kv_heads and set(fields) & {"value_dim", "kv_heads"} else []
    return paths + ([architecture.mlp_consumer] if shape.mlp_width and "mlp_width" in fields else [])


def _width_curve(
    decoder: Decoder, recipe: Recipe, index: int, path: str, loss: LayerLoss, probe: Probe | None
) -> WidthCurve:
    """The losses of one block by greedy elimination of its units, a multiple at a time."""
    shape = decoder.shape(index)
    if path == decoder.architecture.mlp_consumer:
        field, layers = "mlp_width", decoder.mlp_units(index)
    elif "kv_heads" in NARROWED[recipe.units]:
        field, layers = "kv_heads", decoder.kv_units(index)
    else:
        field, layers = "value_dim", decoder.value_units(index)
    there, slots, multiple = asdict(shape)[field], layers.link.slot_count, _multiple(shape, field, recipe)
    problem = LinkedLeastSquares(loss, layers.link, layers.link.units).even()[0]
    assert isinstance(problem, LinkedLeastSquares)
    order, losses, notes = removal_curve(problem, batch=multiple)
    # Entry gone * slots - 1 is the loss once every slot has lost `gone` units.
    after = {there - gone: loss for gone, loss in enumerate(losses[slots - 1 :: slots].tolist(), start=1)}
    allowed = {count: loss for count, loss in after.items() if count % multiple == 0}
    rate = 1.0
    between = [count for count in allowed if count]
    if probe is not None and between:
        count = min(between, key=lambda count: abs(count - (1 - recipe.sparsity) * there))
        kept = torch.ones(layers.link.units, dtype=torch.bool, device=order.device)
        kept[order[: (there - count) * slots]] = False
        mask = layers.link.column_mask(kept, loss.weight.shape[1])
        value = solve(MaskedLeastSquares(loss.plain, mask), Restore()).value
        measured = probe.divergence_with([Change.of(decoder.layer(index, path), value, loss)])
        rate = _rate(measured, allowed[count], loss.metric is not None)
    scaled = {there: 0.0, **{count: rate * lost for count, lost in allowed.items()}}
    return WidthCurve(index, field, there, scaled, notes)


def _multiple(shape: BlockShape, field: str, recipe: Recipe) -> int:
    """What the counts of a field are multiples of, but for the whole count."""
    if field == "kv_heads" or (field == "value_dim" and shape.value_dim % recipe.width_multiple):
        return 1
    return recipe.width_multiple


def _rate(measured: float, predicted: float, in_nats: bool) -> float:
    """A divergence over what the losses predict, which is in the same unit under an output metric only."""
    if in_nats:
        return (measured + UNHEARD) / (predicted + UNHEARD)
    return (measured + UNHEARD) / predicted if predicted > 0 else 1.0


class _Trial:
    """The single weights of a block that a uniform share would remove, for a probe."""

    def __init__(self, recipe: Recipe, probe: Probe | None, in_nats: bool) -> None:
        self.recipe, self.probe, self.in_nats = recipe, probe, in_nats
        self.changes: list[Change] = []
        self.predicted = 0.0

    def add(self, layer: nn.Linear, loss: LayerLoss, entries: Tensor) -> None:
        """Mask a layer where its weights cost least, and refit the others."""
        if self.probe is None:
            return
        mask = pattern_of(layer, self.recipe, 1 - self.recipe.sparsity).project(entries)
        value = solve(MaskedLeastSquares(loss.plain, mask), ConjugateGradients(1e-2)).value
        self.predicted += loss.value(value)
        self.changes.append(Change.of(layer, value, loss))

    def rate(self) -> float:
        """The divergence over what the losses predict."""
        assert self.probe is not None
        return _rate(self.probe.divergence_with(self.changes), self.predicted, self.in_nats)


def _pattern_curve(costs: Tensor, n_m: tuple[int, int]) -> Curve:
    """Two choices: the N:M pattern, at the sum of what its weights cost one by one, or all weights."""
    lost = float(costs[~NM(*n_m).project(costs)].sum())
    prices = torch.tensor([costs.numel() * n_m[0] // n_m[1], costs.numel()])
    return Curve(prices, torch.tensor([lost, 0.0], dtype=torch.float64))


def _shares(decoder: Decoder, recipe: Recipe, costs: Mapping[str, Tensor], curves: Mapping[str, Curve]) -> Allocation:
    """The share that each layer keeps of its single weights."""
    n_m = n_of_m(recipe.pattern)
    if n_m is not None:
        budget = (1 - recipe.sparsity) * decoder.linear_weights()
        chosen = fill_budget(curves, share_budget(curves, budget), budget)
        share = {name: n_m[0] / n_m[1] if choice == 0 else 1.0 for name, choice in chosen.items()}
    else:
        keep = round((1 - recipe.sparsity) * sum(cost.numel() for cost in costs.values()))
        # However little or much is to go, the limits leave room on both sides of the average.
        least, most = min(recipe.least_kept, (1 - recipe.sparsity) / 2), max(recipe.most_kept, 1 - recipe.sparsity / 2)
        # One weight of each layer stays in any case.
        least = max(least, 1e-12)
        kept = global_threshold(costs, keep, least, most)
        share = {name: kept[name] / cost.numel() for name, cost in costs.items()}
    return Allocation.of(
        decoder,
        (
            BlockAllocation(shape, {path: share[decoder.name(index, path)] for path in decoder.paths(index)})
            for index, shape in enumerate(decoder.shapes())
        ),
    )


def check_least(decoder: Decoder, recipe: Recipe) -> None:
    """Raise InputError when the least that widths may keep saves too little, as far as shapes tell (not in time)."""
    if recipe.budget == "time":
        return
    prices, saved = prices_of(decoder, recipe.budget, recipe.budget_tokens, NARROWED[recipe.units]), 0.0
    for index, shape in enumerate(decoder.shapes()):
        for field in NARROWED[recipe.units]:
            there, multiple = asdict(shape)[field], _multiple(shape, field, recipe)
            fewest = min(multiple * math.ceil(recipe.least_kept * there / multiple), there)
            saved += prices.whole[index] - prices.narrowed(index, field, fewest)
    _check_most(recipe, saved / sum(prices.whole), prices.unit)


def _check_most(recipe: Recipe, most: float, unit: str) -> None:
    if recipe.sparsity > most:
        raise InputError(
            f"a sparsity of {recipe.sparsity:g} is out of reach with units {recipe.units!r} and least_kept "
            f"{recipe.least_kept:g}: at most {most:.1%} of {unit} can go"
        )


def _widths(
    decoder: Decoder, recipe: Recipe, widths: Sequence[WidthCurve], on_event: Callable[[Event], None]
) -> Allocation:
    """The number of units that each block keeps."""
    shapes = list(decoder.shapes())

    def on_timed(done: int, total: int) -> None:
        on_event(PhaseAdvanced("measuring the time of narrower blocks", "width", done, total))

    prices = prices_of(decoder, recipe.budget, recipe.budget_tokens, NARROWED[recipe.units], on_timed)
    total, counts, curves = sum(prices.whole), {}, {}
    for width in widths:
        name = f"{width.block} {width.field}"
        counts[name], curves[name] = width.curve(recipe.least_kept, prices)

    def choose() -> dict[str, int]:
        _check_most(recipe, -sum(float(curve.prices[0]) for curve in curves.values()) / total, prices.unit)
        # Prices are below zero: what is saved.
        budget = -recipe.sparsity * total
        return fill_budget(curves, share_budget(curves, budget), budget)

    chosen = choose()
    attention = [f"{width.block} {width.field}" for width in widths if width.field != "mlp_width"]
    if attention and not any(counts[name][chosen[name]] for name in attention):
        # Without any attention no token would see another: the dearest stays.
        dearest = max(attention, key=lambda name: float(curves[name].errors[0]))
        counts[dearest] = counts[dearest][1:]
        curves[dearest] = Curve(curves[dearest].prices[1:], curves[dearest].errors[1:])
        chosen = choose()
    for width, name in zip(widths, counts, strict=True):
        shapes[width.block] = with_count(shapes[width.block], width.field, counts[name][chosen[name]])
    saved = -sum(float(curve.prices[chosen[name]]) for name, curve in curves.items()) / total
    saves = "" if recipe.budget == "parameters" else f"{saved:.2%} of {prices.unit}"
    return Allocation.of(decoder, map(BlockAllocation, shapes), saves)
