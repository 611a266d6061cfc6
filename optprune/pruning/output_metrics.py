"""The output metrics of a run: measured once on the dense model, or read from the run folder."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from optprune.calibration import DenseStatistics, first_tokens
from optprune.calibration.lanes import Lanes
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.program import Program
from optprune.pruning.shared import JournalProtocol
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import METRIC
from optprune.system.wording import counted

MOST_NAMED = 8
"""the most layers that a note names: a model with experts has many"""


def undamped_metrics(
    program: Program,
    decoder: Decoder,
    batches: Sequence[Tensor],
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
    lanes: Lanes,
) -> Metrics:
    """Return the output metrics of a program that has some, without damping."""
    assert program.metric is not None
    widest, used = program.metric.width or math.inf, first_tokens(batches, program.metric.tokens)

    def on_pass(done: int, total: int) -> None:
        on_event(PhaseAdvanced(METRIC, "measuring the output metric", "pass", done, total))

    return statistics.metrics(decoder, used, program.seed, program.whole_metric, widest, on_pass, lanes)


def measured_metrics(
    program: Program,
    decoder: Decoder,
    batches: list[Tensor],
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
    journal: JournalProtocol | None,
    lanes: Lanes,
) -> tuple[Metrics, tuple[str, ...]]:
    """Return the damped output metrics, and notes where they are less than the recipe asks for.

    A run that continues has those that were measured before it was stopped.
    """
    asked = program.metric
    if asked is None:
        return Metrics({}), ()
    metrics = None
    if journal is not None:
        # What divides the budget needs the metric of every block, those of finished blocks too.
        finished = journal.finished() if journal.division() is not None else []
        metrics = journal.metrics.read(decoder, finished)
    if metrics is None:
        metrics = undamped_metrics(program, decoder, batches, statistics, on_event, lanes)
        metrics = metrics if journal is None else journal.metrics.keep(decoder, metrics)
    small = metrics.diagonal_only()
    cut = [path for path in program.whole_metric if any(name.endswith(f".{path}") for name in small)]
    notes = list[str]()
    if cut:
        named = ", ".join(cut[:MOST_NAMED]) + (f" and {len(cut) - MOST_NAMED} more" if len(cut) > MOST_NAMED else "")
        notes.append(
            f"of {named} with over {asked.width or math.inf} outputs (metric.width) only the diagonal of the metric is "
            "used"
        )
    reached, blocks = set(metrics), range(len(decoder.blocks))
    every = [decoder.name(index, path) for index in blocks for path in decoder.paths(index)]
    missed = [name for name in every if name not in reached]
    if missed:
        notes.append(
            f"no token of the output metric reached {counted(len(missed), 'layer')}, as {missed[0]}: outputs count "
            "alike"
        )
    return metrics.damped(asked.damping), tuple(notes)
