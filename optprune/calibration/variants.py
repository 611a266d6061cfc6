"""Variants: a model with one block changed, for many changes, in one pass of its blocks."""

from collections.abc import Sequence

from torch import Tensor

from optprune.calibration.stream import advance, first_inputs, run_block
from optprune.models import Decoder
from optprune.models.places import States


class Variants:
    """Goes through a model block by block; what a changed block gives goes along behind it, to the end.

    So each block is needed once, however many there are. For each the hidden states of the batches are put aside.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """The `batches` are token ids [batch, length], without padding."""
        self.decoder = decoder
        self.stream = first_inputs(decoder, batches)
        """the hidden states of the model without a change"""
        self._along: list[States[Tensor]] = []
        self._fresh: list[States[Tensor]] = []
        """the hidden states of the changes of the current block, which are behind it already"""

    def add(self) -> None:
        """Have what the current block gives, as it is now, go along as one more."""
        self._fresh.append(self._behind(self.stream.hidden))

    def advance(self) -> None:
        """Go on to the next block, through the current one as it is now."""
        with self.decoder.resident(self.stream.block) as block:
            for number, entries in enumerate(self._along):
                self._along[number] = self._behind(entries)
            advance(block, self.stream)
        self._along += self._fresh
        self._fresh = []

    def ends(self) -> list[States[Tensor]]:
        """What has come out of the last block, in the order in which they were added: the hidden states by batch."""
        return self._along

    def _behind(self, hidden: States[Tensor]) -> States[Tensor]:
        with self.decoder.resident(self.stream.block) as block:
            batches = zip(hidden, self.stream.arguments, strict=True)
            return States(self.decoder.offload, (run_block(block, entry, arguments)[1] for entry, arguments in batches))
