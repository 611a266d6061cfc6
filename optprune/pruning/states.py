"""Where the hidden states of a run are kept: on the device, in the host's memory, or in a file, by their size."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from optprune.errors import InputError
from optprune.measure.memory import free_memory
from optprune.models import Decoder
from optprune.models.places import InFile, OnDevice, OnHost, Place

STATES = ("auto", "device", "host", "disk")
"""what a user may say"""
COPIES = 4
"""how often hidden states may be there: those that enter a block, those that leave it, and the calls of a sub-module
with their answers"""
SHARE = 0.5
"""the share of the free memory that they may have: the rest is for a block and the solve of a layer"""


def check_states(states: str) -> None:
    """Raise InputError where nobody knows such a place."""
    if states not in STATES:
        raise InputError(f"hidden states cannot be kept on {states!r}: choose {', '.join(STATES[:-1])} or {STATES[-1]}")


def place_for(states: str, decoder: Decoder, batches: Sequence[Tensor], folder: Path | None) -> Place:
    """Where the hidden states of token ids [batch, length] are kept; `folder` is for a file of them.

    "auto" is the device where four copies of them fit in half of its free memory, else the host's memory by the same
    measure, else a file. Without a `folder` that is where the model's store puts things aside, or the system's folder
    of temporary files. What is chosen changes no bit of a result.
    """
    check_states(states)
    if states == "auto":
        states = _by_size(decoder, sum(batch.numel() for batch in batches))
    if states == "device":
        return OnDevice()
    if states == "host":
        return OnHost()
    if folder is not None:
        return InFile(folder)
    return InFile(Path(tempfile.gettempdir())) if decoder.store is None else decoder.store.offload


def _by_size(decoder: Decoder, tokens: int) -> str:
    """The first place with room enough; where the system tells nothing, there is."""
    model = decoder.model
    size = COPIES * tokens * model.config.hidden_size * (decoder.computes_in or model.dtype).itemsize
    for name, device in (("device", model.device.type), ("host", "cpu")):
        free = free_memory(model.device if device != "cpu" else None)
        if free is None or size <= SHARE * free:
            return name
    return "disk"
