"""Pruning of the first blocks of a model alone, with the output metrics of the whole model."""

import copy
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune import Recipe, Statistics, prune
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.report import Report


class OfTheWhole(Statistics):
    """Output metrics of the whole model, whatever part of it is pruned."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.whole = Decoder(model)

    def metrics(self, decoder: Decoder, *asked: Any) -> Metrics:
        return super().metrics(self.whole, *asked)


def prune_first_blocks(
    model: PreTrainedModel, count: int, batches: Sequence[Tensor], recipe: Recipe, statistics: OfTheWhole
) -> tuple[PreTrainedModel, Report, float]:
    """Return a copy of a Llama whose first blocks are pruned, the report, and the seconds of CPU time."""
    pruned, began = copy.deepcopy(model), time.process_time()
    every = pruned.model.layers
    pruned.model.layers = every[:count]
    report = prune(pruned, batches, recipe, statistics=statistics)
    seconds = time.process_time() - began
    pruned.model.layers = nn.ModuleList([*pruned.model.layers, *every[count:]])
    return pruned, report, seconds
