"""The dense model's predictions, kept for the divergence of every model that is made from it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from optprune.calibration import advance, calibrating, first_inputs
from optprune.measure import Divergence, divergence_of
from optprune.measure.evaluate import TOKENS_AT_ONCE, check_windows
from optprune.models import Decoder
from optprune.models.places import States
from optprune.pruning.states import place_for


class DensePredictions:
    """What a dense model predicts on windows of token ids [n, length], which do not see each other.

    Kept are the hidden states behind the last block, [n, length, hidden], where there is room for them: logits over the
    whole vocabulary would be many times as large, and are made again by the head.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, folder: Path | None = None) -> None:
        """The model is gone through once; a `folder` is for a file of the hidden states."""
        check_windows(windows)
        self.decoder, self.windows, self._folder = decoder, windows, folder
        self._batches = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
        self._ends = self._behind(decoder)

    def beside(self, decoder: Decoder, on_window: Callable[[int, int], None] | None = None) -> Divergence:
        """The divergence of another model, whose blocks may be read one at a time, from the dense one.

        NumericalError where it gives NaN.
        """
        return self._compared(decoder, self._behind(decoder), on_window)

    def itself(self) -> Divergence:
        """The dense model beside itself: its perplexity, no divergence, all choices the same."""
        return self._compared(self.decoder, self._ends, None)

    def _behind(self, decoder: Decoder) -> States[Tensor]:
        """What leaves the last block, by batch."""
        decoder.states = place_for("auto", decoder, self._batches, self._folder)
        with calibrating(decoder):
            stream = first_inputs(decoder, self._batches)
            for index in range(len(decoder.blocks)):
                with decoder.resident(index) as block:
                    advance(block, stream)
        return stream.hidden

    def _compared(
        self, decoder: Decoder, ends: Sequence[Tensor], on_window: Callable[[int, int], None] | None
    ) -> Divergence:
        dense = self.decoder
        with calibrating(decoder), calibrating(dense), decoder.head_in_dtype(), dense.head_in_dtype(), torch.no_grad():
            pairs = zip(ends, self._ends, strict=True)
            logits = ((decoder.logits(found), dense.logits(expected)) for found, expected in pairs)
            return divergence_of(self.windows, logits, on_window)
