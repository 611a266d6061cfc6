"""The output metrics that a recipe asks for."""

import math
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from optprune.calibration import DenseStatistics, first_tokens
from optprune.calibration.partial_sums import PartialSums
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.recipe import Recipe
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import METRIC


def whole_in(decoder: Decoder, recipe: Recipe) -> Collection[str]:
    """The layers of a block, by their paths, of which a recipe asks for the whole metric."""
    asked = recipe.metric
    return recipe.units.whole_metric(decoder.architecture) if asked is not None and asked.kind == "full" else ()


def asked_metrics(
    decoder: Decoder,
    batches: Sequence[Tensor],
    recipe: Recipe,
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
    partial_sums: PartialSums,
) -> Metrics:
    """The output metrics of a recipe that asks for some, not damped."""
    assert recipe.metric is not None
    widest, used = recipe.metric.width or math.inf, first_tokens(batches, recipe.metric.tokens)

    def on_pass(done: int, total: int) -> None:
        on_event(PhaseAdvanced(METRIC, "measuring the output metric", "pass", done, total))

    return statistics.metrics(decoder, used, recipe.seed, whole_in(decoder, recipe), widest, on_pass, partial_sums)
