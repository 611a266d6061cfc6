"""The facts of a run: everything that decides its bytes, so that it continues only as it was begun."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optprune.calibration.lanes import Lanes
from optprune.models import Decoder
from optprune.models.draft import DRAFT_FIELD
from optprune.numerics.fingerprint import fingerprint
from optprune.program import Program
from optprune.pruning.journal import digest_of_model
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import LOADING
from optprune.system.facts import machine, versions

OPENED = 0.5
"""the approximate share of the loading that is done when a model is open and its weights are still to be read"""


def facts(
    program: Program, decoder: Decoder, batches: list[Tensor], lanes: Lanes, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Return everything that decides the bytes of a run. All weights are read for it; events report how many."""

    def on_bytes(done: int, total: int) -> None:
        on_event(PhaseAdvanced(LOADING, "reading all weights once", "MiB", done >> 20, total >> 20, OPENED))

    return {
        "the model": digest_of_model(decoder, on_bytes),
        "its architecture": getattr(decoder.model.config, DRAFT_FIELD, None),
        "its dtype": str(decoder.model.dtype),
        "the calibration tokens": fingerprint(batches),
        "the lanes": lanes.count,
        **program.facts(),
        "the version": versions(),
        "the machine": machine(decoder.model.device),
        "the blocks": len(decoder.blocks),
    }
