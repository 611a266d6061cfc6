"""The facts of a run: what decides its bytes, so that it goes on only as it was begun."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optprune.allocation import Allocation
from optprune.calibration.partial_sums import PartialSums
from optprune.models import Decoder
from optprune.models.draft import DRAFT_FIELD
from optprune.numerics.fingerprint import fingerprint
from optprune.pruning.journal import digest_of_model
from optprune.recipe import Recipe
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import LOADING
from optprune.system.environment import machine, versions

OPENED = 0.5
"""the share of the loading that is done, roughly, when a model is there and its weights are to be read for a digest"""


def asked(recipe: Recipe, allocation: Allocation | None) -> dict[str, Any]:
    """Return the facts that a command says by itself, before a model or a text is read."""
    allocation = allocation or recipe.given
    resolved = (recipe.worked() if allocation is None else recipe).settled()
    return {
        # The summary is text about the other fields.
        "the recipe": {name: value for name, value in resolved.to_dict().items() if name != "summary"},
        "the allocation": None if allocation is None else allocation.to_dict(),
    }


def facts(
    decoder: Decoder,
    batches: list[Tensor],
    recipe: Recipe,
    allocation: Allocation | None,
    partial_sums: PartialSums,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """Return what decides the bytes of a run. All weights are read for it, which the events tell of."""

    def on_bytes(done: int, total: int) -> None:
        on_event(PhaseAdvanced(LOADING, "reading all weights once", "MiB", done >> 20, total >> 20, OPENED))

    return {
        "the model": digest_of_model(decoder, on_bytes),
        "its architecture": getattr(decoder.model.config, DRAFT_FIELD, None),
        "its dtype": str(decoder.model.dtype),
        "the calibration tokens": fingerprint(batches),
        "the number of partial sums": partial_sums.count,
        **asked(recipe, allocation),
        "the version": versions(),
        "the machine": machine(decoder.model.device),
        "the blocks": len(decoder.blocks),
    }
