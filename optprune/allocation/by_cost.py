"""One budget for the whole model, divided by what each block would lose: an `Allocation` from measured costs.

The costs come from the dense model, in one pass of the calibration tokens, and are in one unit only under an output
metric: without one a layer with large outputs seems important because they are large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from optprune.allocation.base import DenseModel, Division, MeasuredBudget
from optprune.allocation.cost_work import CostWork
from optprune.allocation.costs import CostBudget, Costs
from optprune.calibration import DensePass, Probe, Stream, first_inputs
from optprune.errors import NumericalError
from optprune.measure.memory import release
from optprune.models import Decoder, Target, Units
from optprune.problems import LayerLoss
from optprune.report import PhaseAdvanced
from optprune.report.phases import BUDGET

UNLIKE_UNITS = (
    "the budget was divided by squared errors without an output metric, which are not in one unit from layer to layer: "
    "set output_metric to diagonal, or probe_tokens to 512"
)
"""the note of a division without an output metric and without probes"""


@final
@dataclass(frozen=True)
class ByCost(MeasuredBudget):
    """Divide a budget over the whole model so that the sum of the layers' losses is least.

    Costs one calibration pass with its Gram products, and in^3 for each layer. Warnings tell of layers whose Gram
    matrix had to be damped further.

    With `probe_tokens` the units of each layer, or the single weights of each block, are also removed alone, down to
    about the share that all keep, and the costs are scaled to the divergence that this brings: a pass over about so
    many tokens from that block on.
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

    def work(self, decoder: Decoder, tokens: int) -> float:
        return CostWork.of(decoder, self.units, self.budget, tokens, self.probe_tokens).whole

    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        costs = self.gathered(dense, stream, probe)
        allocation = costs.allocation(dense.on_event, self._work(dense, probe).before_ending)
        return Division(allocation, warnings=costs.warnings, notes=costs.notes)

    def _work(self, dense: DenseModel, probe: Probe | None) -> CostWork:
        tokens = sum(batch.numel() for batch in dense.batches)
        return CostWork.of(dense.decoder, self.units, self.budget, tokens, 0 if probe is None else self.probe_tokens)

    def gathered(self, dense: DenseModel, stream: Stream | None = None, probe: Probe | None = None) -> Costs:
        """What the layers would lose, which only a probe may let hang on the sparsity."""
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

        dense_pass = DensePass(decoder, entering, known, taps)

        work, what = self._work(dense, probe), "measuring what blocks would lose"

        def measured(done: int) -> None:
            shares = {"ends": work.before_ending, "within": work.done(done)}
            on_event(PhaseAdvanced(BUDGET, what, "block", done, blocks, **shares))

        measured(0)
        for index in range(blocks):
            with decoder.resident(index):
                moments = dense_pass.visit(index).moments
                for target in candidates[index]:
                    layer, name = decoder.layer(index, target.path), decoder.name(index, target.path)
                    fit_bias = self.fit_bias and layer.bias is not None
                    loss = LayerLoss.of(
                        layer.weight, moments[target.tap], self.damping, fit_bias=fit_bias, metric=metrics.get(name)
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
