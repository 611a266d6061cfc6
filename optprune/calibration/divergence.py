"""Divergence: the change of a model's predictions when one block of it is changed, for many changes in one pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE, next_tokens
from optprune.calibration.stream import advance, block_pass, first_inputs, head_work, run_block, stream_bytes
from optprune.models import Decoder
from optprune.models.places import States
from optprune.models.surgery import write
from optprune.numerics.tensors import divergence_terms
from optprune.problems import LayerLoss
from optprune.work import Work


class Variants:
    """A pass through a model block by block, with variants of the model that differ in one block each.

    The hidden states of every variant travel along from its block to the end, so each block is read once, however many
    variants there are. The hidden states of all batches are kept for each.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """Start a pass of token ids [batch, length] without padding."""
        self.decoder = decoder
        self.stream = first_inputs(decoder, batches)
        """the hidden states of the unchanged model"""
        self._travelling: list[States[Tensor]] = []
        self._added: list[States[Tensor]] = []
        """the outputs of the variants of the current block"""

    def add(self) -> None:
        """Add a variant: the model with the current block as it is now."""
        self._added.append(self._outputs(self.stream.hidden))

    def advance(self) -> None:
        """Move on to the next block, through the current one as it is now."""
        with self.decoder.resident(self.stream.block) as block:
            for number, entries in enumerate(self._travelling):
                self._travelling[number] = self._outputs(entries)
            advance(block, self.stream)
        self._travelling += self._added
        self._added = []

    def ends(self) -> list[States[Tensor]]:
        """Return the hidden states after the last block, by batch, of all variants in the order of their addition."""
        return self._travelling

    def _outputs(self, hidden: States[Tensor]) -> States[Tensor]:
        with self.decoder.resident(self.stream.block) as block:
            batches = zip(hidden, self.stream.arguments, strict=True)
            return States(self.decoder.offload, (run_block(block, entry, arguments)[1] for entry, arguments in batches))


@dataclass(frozen=True, eq=False)
class Change:
    """A layer with another weight and bias."""

    layer: nn.Linear
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear, weight: Tensor, loss: LayerLoss) -> "Change":
        """Return the change to another weight, with its bias where the loss fits one."""
        bias = None
        if layer.bias is not None and loss.fit_bias:
            bias = layer.bias.detach() + loss.bias_change(weight)
        return cls(layer, weight.to(layer.weight.dtype), bias)

    def undo(self) -> "Change":
        """Return the change back to the layer's present weight and bias."""
        bias = self.layer.bias
        return Change(self.layer, self.layer.weight.detach().clone(), None if bias is None else bias.detach().clone())

    def write(self) -> None:
        """Write the weight and the bias into the layer."""
        write(self.layer, self.weight, self.bias)


class Probe:
    """A pass through a dense model block by block, which tries changes of each block.

    One pass of the model serves any number of changes; all divergences are known at its end.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """Start a pass of token ids [batch, length] without padding."""
        self.decoder, self.variants = decoder, Variants(decoder, batches)
        vocabulary = decoder.model.config.vocab_size
        self._predicting = [(next_tokens(ids) < vocabulary).flatten() for ids in batches]
        """for each batch its positions whose next token is predicted, which one of an image is not"""

    def try_out(self, changes: Sequence[Change]) -> None:
        """Try changes of some layers of the current block together; the layers are restored."""
        before = [change.undo() for change in changes]
        try:
            for change in changes:
                change.write()
            self.try_as_is()
        finally:
            for change in before:
                change.write()

    def try_as_is(self) -> None:
        """Try the current block as it is now; the caller restores it before the probe moves on."""
        self.variants.add()

    def try_without(self, block: int, part: str) -> None:
        """Try the current block, which has this number, without a sub-block."""
        with self.decoder.without([(block, part)]):
            self.try_as_is()

    def advance(self) -> None:
        """Move on to the next block, through the current one as it is now."""
        self.variants.advance()

    def divergences(self, on_change: Callable[[int, int], None] = lambda done, total: None) -> list[float]:
        """Return KL(dense || changed) of all changes tried, in nats a token: the mean over the tokens' predictions.

        Positions before a token of an image, which is not predicted, do not count. Called after the last block.
        `on_change` is called with the predictions made so far, counted in changes, and with the number of changes.
        """
        dense, changes = self.variants.stream.hidden, self.variants.ends()
        totals, predictions = [0.0] * len(changes), 0
        tokens = sum(int(positions.sum()) for positions in self._predicting)
        on_change(0, len(changes))
        with self.decoder.head_in_dtype():
            for number, expected in enumerate(dense):
                # The dense model's predictions are computed once for all changes.
                for rows, log_p in self._predicted(self._counted(expected, number)):
                    for index, changed in enumerate(changes):
                        log_q = self._log_probabilities(self._counted(changed[number], number)[rows])
                        totals[index] += float(divergence_terms(log_p, log_q).sum(dtype=torch.float64))
                        predictions += len(log_q)
                        on_change(predictions // tokens, len(changes))
        return [max(total / tokens, 0.0) for total in totals]

    def _counted(self, hidden: Tensor, number: int) -> Tensor:
        """Return the hidden states [positions, hidden] of a batch whose predictions count."""
        positions = self._predicting[number]
        return hidden.flatten(0, 1) if bool(positions.all()) else hidden.flatten(0, 1)[positions.to(hidden.device)]

    def _predicted(self, every: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the log-probabilities of the next tokens, for some rows at a time: [rows, vocabulary]."""
        for first in range(0, len(every), POSITIONS_AT_ONCE):
            rows = slice(first, first + POSITIONS_AT_ONCE)
            yield rows, self._log_probabilities(every[rows])

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden).log_softmax(-1)


# -- the work of a probe


def probe_block_work(decoder: Decoder, index: int, tokens: int, changes: int) -> Work:
    """Return the work of a probe in one block, where so many changes of it and of earlier blocks travel through it."""
    return Work((block_pass(decoder, index) * (tokens * changes)).flops)


def probe_end_work(decoder: Decoder, tokens: int, changes: int) -> Work:
    """Return the work of all divergences: the head once for the dense model and once for each change."""
    kept = 0 if decoder.store is not None else changes * stream_bytes(decoder, tokens)
    return head_work(decoder, tokens) * (changes + bool(changes)) + Work(bytes=kept)
