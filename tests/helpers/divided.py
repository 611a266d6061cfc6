"""The division of one budget over the blocks of a model, as a run makes it."""

from optprune.allocation import Allocation, DenseModel
from optprune.calibration import calibrating, first_inputs
from optprune.metric import OutputMetric
from optprune.models import Decoder
from optprune.recipe import Recipe
from optprune.recipe.recipe import by_cost
from optprune.report import PhaseAdvanced
from tests.helpers.token_batches import batches


def divided(decoder: Decoder, recipe: Recipe, metrics: dict[str, OutputMetric] | None = None) -> Allocation:
    with calibrating(decoder):
        stream = first_inputs(decoder, batches())
        events: list[object] = []
        dense = DenseModel(decoder, batches(), metrics or {}, on_event=events.append)
        allocation = by_cost(recipe).along(dense, stream).allocation
    measured = [event.done for event in events if isinstance(event, PhaseAdvanced)]
    assert measured == list(range(len(decoder.blocks) + 1))
    return allocation
