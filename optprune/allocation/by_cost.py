"""Allocator of one budget for the whole model by costs of removal that are measured block by block.

The costs come from the dense model, in one pass of the calibration tokens, and are in one unit only under an output
metric: without one a layer with large outputs seems important because they are large.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import DenseModel, Division, MeasuredBudget
from optprune.calibration import DensePass, DenseStatistics, Probe, Stream, first_inputs
from optprune.calibration.divergence import probe_block_work, probe_end_work
from optprune.calibration.moments_pass import moments_bytes, moments_work
from optprune.errors import NumericalError
from optprune.measure.memory import release
from optprune.models import Decoder, Target, Units
from optprune.problems import LayerLoss
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.work import Work

NOISE_FLOOR_NATS = 1e-5
"""the smallest divergence, in nats a token, above the rounding errors of float32"""
UNLIKE_UNITS = (
    "the budget was divided by squared errors without an output metric, which do not compare between layers: "
    "set metric to diagonal, or allocation.probe_tokens to 512"
)
"""the note of a division without an output metric and without probes"""


class Costs(ABC):
    """Collection of the costs of a dense model's layers, filled block by block.

    Costs must be in one unit, which losses are under an output metric only.
    """

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the measurement, which are errors in strict mode."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the allocation, once there is one."""
        return ()

    @abstractmethod
    def add(self, block: int, target: Target, loss: LayerLoss) -> None:
        """Add the costs of a layer."""

    @abstractmethod
    def close(self) -> None:
        """Finish a block, all of whose layers are added: try the changes that a probe measures together."""

    @abstractmethod
    def allocation(self, on_event: Callable[[Event], None], begins: float = 0.0) -> Allocation:
        """Return the allocation once all blocks are finished and the probe is at the end, rescaled by the probe.

        `begins` is the share of the budget's work that is already done.
        """

    @staticmethod
    def divergences(probe: Probe, on_event: Callable[[Event], None], begins: float) -> list[float]:
        """Return the divergences of all changes that a probe has tried, with progress events."""

        def measured(done: int, total: int) -> None:
            on_event(
                PhaseAdvanced(BUDGET, "measuring the effect of changes on predictions", "change", done, total, begins)
            )

        return probe.divergences(measured)


class CostBudget(ABC):
    """Budget over the whole model that is divided by costs."""

    @abstractmethod
    def check(self, decoder: Decoder) -> None:
        """Raise InputError where no costs can divide it over a model of these shapes."""

    @abstractmethod
    def changes(self, targets: Sequence[Target]) -> int:
        """Return the number of changes that a probe tries of a block with these layers."""

    @abstractmethod
    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        """Return an empty collection. A `probe` rescales costs; `in_nats` says that losses are already in its unit."""

    @abstractmethod
    def layer_work(self, shapes: Decoder, block: int, target: Target) -> Work:
        """Return the work of measuring the costs of a layer of a block."""

    @abstractmethod
    def step(self, shapes: Decoder) -> float:
        """Return the most linear weights that one choice more removes."""

    def held_bytes(self, decoder: Decoder) -> int:
        """Return the memory of the costs of all layers, which are held until the end."""
        return 0


def rate_of(measured: float, predicted: float, in_nats: bool) -> float:
    """Return a measured divergence over the predicted loss, which has its unit under an output metric only."""
    if in_nats:
        return (measured + NOISE_FLOOR_NATS) / (predicted + NOISE_FLOOR_NATS)
    return (measured + NOISE_FLOOR_NATS) / predicted if predicted > 0 else 1.0


@final
@dataclass(frozen=True)
class ByCost(MeasuredBudget):
    """Allocator that divides a budget over the whole model so that the sum of the layers' losses is least.

    Costs one calibration pass with its Gram products, and in^3 for each layer. Warnings name the layers whose Gram
    matrix had to be damped further.

    With `probe_tokens` the units of each layer, or the single weights of each block, are also removed alone, down to
    about the share that all keep, and the costs are rescaled to the divergence that this causes: a pass of that many
    tokens from that block on.
    """

    units: Units
    budget: CostBudget
    damping: float
    """the damping of the layers' losses"""
    fit_bias: bool
    weighed: bool
    """whether an output metric weighs the losses"""
    probe_tokens: int

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.weighed or self.probe_tokens else (UNLIKE_UNITS,)

    def changes(self, targets: Sequence[Target]) -> int:
        return self.budget.changes(targets)

    def check(self, decoder: Decoder) -> None:
        self.budget.check(decoder)

    def step(self, shapes: Decoder) -> float:
        return self.budget.step(shapes)

    def work(self, shapes: Decoder, tokens: int) -> Work:
        blocks, end = self._works(shapes, tokens, self.probe_tokens)
        passing = sum(blocks, Work())
        held = max(passing.bytes, end.bytes) + self.budget.held_bytes(shapes)
        return Work(passing.flops + end.flops, held, passes=1.0)

    def _works(self, shapes: Decoder, tokens: int, probe_tokens: int) -> tuple[list[Work], Work]:
        """Return the work of each block, and that of the divergences at the end; no `probe_tokens` for no probe."""
        found, changes = list[Work](), 0
        for block in range(len(shapes.blocks)):
            targets = self.units.candidates(shapes, block)
            taps, own = {target.tap for target in targets}, self.budget.changes(targets)
            work, kept = moments_work(shapes, block, taps, tokens), moments_bytes(shapes, block, taps)
            if probe_tokens:
                # The layers as the probe tries them together, in float32.
                kept += sum(4 * shapes.layer(block, path).weight.numel() for path in {each.path for each in targets})
            for target in targets:
                costing = self.budget.layer_work(shapes, block, target)
                work += Work(costing.flops, kept + costing.bytes)
            found.append(work + probe_block_work(shapes, block, probe_tokens, changes + own))
            changes += own
        return found, probe_end_work(shapes, probe_tokens, changes) if probe_tokens else Work()

    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        costs = self.gathered(dense, stream, probe)
        allocation = costs.allocation(dense.on_event, self._shares(dense, probe)[-1])
        return Division(allocation, warnings=costs.warnings, notes=costs.notes)

    def _shares(self, dense: DenseModel, probe: Probe | None) -> list[float]:
        """Return the share of the whole work that is done before each block, and before the divergences at the end."""
        tokens = sum(batch.numel() for batch in dense.batches)
        blocks, end = self._works(dense.decoder, tokens, 0 if probe is None else self.probe_tokens)
        *done, whole = accumulate((work.flops for work in (*blocks, end)), initial=0.0)
        return [flops / whole for flops in done]

    def gathered(self, dense: DenseModel, stream: Stream | None = None, probe: Probe | None = None) -> Costs:
        """Return the costs of all layers, which depend on the sparsity only where there is a probe."""
        decoder, metrics, on_event = dense.decoder, dense.metrics, dense.on_event
        costs, blocks = self.budget.costs(decoder, dense.statistics, probe, bool(metrics)), len(decoder.blocks)
        candidates = [self.units.candidates(decoder, index) for index in range(blocks)]
        order = decoder.architecture.layers.index
        taps = [sorted({target.tap for target in targets}, key=order) for targets in candidates]
        known = None
        if stream is None:
            known = dense.statistics.known(decoder, dense.batches, 0, dense.partial_sums)

        def entering() -> Stream:
            return stream or first_inputs(decoder, dense.batches, dense.partial_sums)

        dense_pass, shares = DensePass(decoder, entering, known, taps), self._shares(dense, probe)

        def measured(done: int) -> None:
            within = {"ends": shares[-1], "within": shares[done] / shares[-1]}
            on_event(PhaseAdvanced(BUDGET, "measuring the costs of removal", "block", done, blocks, **within))

        measured(0)
        for index in range(blocks):
            with decoder.resident(index):
                moments = dense_pass.visit(index).moments
                for target in candidates[index]:
                    layer, name = decoder.layer(index, target.path), decoder.name(index, target.path)
                    loss = target.loss(
                        layer, moments[target.tap], self.damping, fit_bias=self.fit_bias, metric=metrics.get(name)
                    )
                    try:
                        costs.add(index, target, loss)
                    except NumericalError as error:
                        raise NumericalError(f"{name}: {error}") from error
                costs.close()
                if probe is not None:
                    probe.advance()
            release()
            measured(index + 1)
        return costs
