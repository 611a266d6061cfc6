"""What a change of one block really costs the model: the divergence of its predictions from the dense model's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE
from optprune.calibration.variants import Variants
from optprune.models import Decoder
from optprune.models.digits import readout
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

        Asked for at the end, behind the last block. `on_change` hears how many are known, and of how many.
        """
        found, ends = list[float](), self.variants.ends()
        on_change(0, len(ends))
        with readout(self.decoder):
            for changed in ends:
                found.append(self._divergence(self.variants.stream.hidden, changed))
                on_change(len(found), len(ends))
        return found

    def _divergence(self, dense: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
        total, tokens = 0.0, 0
        for pair in zip(dense, changed, strict=True):
            parts = (hidden.flatten(0, 1).split(POSITIONS_AT_ONCE // 2) for hidden in pair)
            for expected, found in zip(*parts, strict=True):
                # In one product with the head, which is slow for few rows at a time.
                log_p, log_q = self.decoder.logits(torch.cat([expected, found])).log_softmax(-1).chunk(2)
                total += float(divergence_terms(log_p, log_q).sum(dtype=torch.float64))
                tokens += len(expected)
        return max(total / tokens, 0.0)
