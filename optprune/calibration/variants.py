"""Variants: a model with one block changed, for many changes, in one pass of its blocks."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from optprune.calibration.stream import advance, first_inputs, run_block
from optprune.models import Decoder
from optprune.models.store import Aside


class Variants:
    """Goes through a model block by block; what a changed block gives goes along behind it, to the end.

    So each block is needed once, however many there are. For each the hidden states of the batches are put aside.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """The `batches` are token ids [batch, length], without padding."""
        self.decoder = decoder
        self.stream = first_inputs(decoder, batches)
        """the hidden states of the model without a change"""
        self._along: list[Aside] = []
        self._fresh: list[Aside] = []
        """the hidden states of the changes of the current block, which are behind it already"""

    def add(self) -> None:
        """Have what the current block gives, as it is now, go along as one more."""
        self._fresh.append(self._behind(self.stream.hidden))

    def advance(self) -> None:
        """Go on to the next block, through the current one as it is now."""
        with self.decoder.resident(self.stream.block) as block:
            for number, entries in enumerate(self._along):
                self._along[number] = self._behind(list(entries.get().values()))
            advance(block, self.stream)
        self._along += self._fresh
        self._fresh = []

    def ends(self) -> Iterator[list[Tensor]]:
        """What has come out of the last block, in the order in which they were added: the hidden states by batch."""
        for entries in self._along:
            yield list(entries.get().values())

    def _behind(self, hidden: list[Tensor]) -> Aside:
        with self.decoder.resident(self.stream.block) as block:
            batches = enumerate(zip(hidden, self.stream.arguments, strict=True))
            outputs = {str(number): run_block(block, entry, arguments)[1] for number, (entry, arguments) in batches}
        return self.decoder.put_aside(outputs)
