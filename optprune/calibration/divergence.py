"""What a change of one block really costs the model: the divergence of its predictions from the dense model's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE
from optprune.calibration.variants import Variants
from optprune.models import Decoder
from optprune.models.surgery import write
from optprune.numerics.kullback_leibler import divergence_terms
from optprune.problems import LayerLoss


@dataclass(frozen=True, eq=False)
class Change:
    """A layer, and another weight and bias for it."""

    layer: nn.Linear
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear, weight: Tensor, loss: LayerLoss) -> "Change":
        """Another weight, with the bias that goes with it where the loss fits one."""
        bias = None
        if layer.bias is not None and loss.fit_bias:
            bias = layer.bias.detach() + loss.bias_change(weight)
        return cls(layer, weight.to(layer.weight.dtype), bias)

    def undo(self) -> "Change":
        """What makes the layer again what it is now."""
        bias = self.layer.bias
        return Change(self.layer, self.layer.weight.detach().clone(), None if bias is None else bias.detach().clone())

    def write(self) -> None:
        """Make it so."""
        write(self.layer, self.weight, self.bias)


class Probe:
    """Goes through a dense model block by block; at each, changes of that block can be tried.

    The model is gone through once, whatever is tried, and all divergences are there at the end.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """The `batches` are token ids [batch, length], without padding."""
        self.decoder, self.variants = decoder, Variants(decoder, batches)

    def try_out(self, changes: Sequence[Change]) -> None:
        """Change some layers of the current block, for one divergence; they are left as they were."""
        before = [change.undo() for change in changes]
        try:
            for change in changes:
                change.write()
            self.try_as_is()
        finally:
            for change in before:
                change.write()

    def try_as_is(self) -> None:
        """Take the current block as it is now, for one divergence; who asks puts it back before the probe goes on."""
        self.variants.add()

    def try_without(self, block: int, part: str) -> None:
        """Have a sub-block of the current block, which is that number, gone for one divergence."""
        with self.decoder.without([(block, part)]):
            self.try_as_is()

    def advance(self) -> None:
        """Go on to the next block, through the current one as it is now."""
        self.variants.advance()

    def divergences(self, on_change: Callable[[int, int], None] = lambda done, total: None) -> list[float]:
        """KL(dense || changed), in nats a token, of all that was tried: the mean over the tokens' predictions.

        Asked for at the end, behind the last block. `on_change` hears how many of the changes' predictions are made, in
        changes, and how many changes there are.
        """
        dense, changes = self.variants.stream.hidden, self.variants.ends()
        totals, predictions, tokens = [0.0] * len(changes), 0, dense.tokens
        on_change(0, len(changes))
        with self.decoder.head_in_dtype():
            for number, expected in enumerate(dense):
                # What the dense model predicts there is computed once for all changes.
                for rows, log_p in self._predicted(expected):
                    for index, changed in enumerate(changes):
                        log_q = self._log_probabilities(changed[number].flatten(0, 1)[rows])
                        totals[index] += float(divergence_terms(log_p, log_q).sum(dtype=torch.float64))
                        predictions += len(log_q)
                        on_change(predictions // tokens, len(changes))
        return [max(total / tokens, 0.0) for total in totals]

    def _predicted(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The log-probabilities of a batch's next tokens, of some rows at a time: [rows, vocabulary]."""
        every = hidden.flatten(0, 1)
        for first in range(0, len(every), POSITIONS_AT_ONCE):
            rows = slice(first, first + POSITIONS_AT_ONCE)
            yield rows, self._log_probabilities(every[rows])

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden).log_softmax(-1)
