"""What a change of one block really costs the model: the divergence of its predictions from the dense model's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE
from optprune.calibration.stream import Stream, advance, first_inputs, run_block
from optprune.models import Decoder
from optprune.models.decoder import write
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
    """Goes through a dense model block by block; at each, what was done to that block can be measured.

    Keeps the hidden states of some sequences before the current block and behind the last: two tensors of their size.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]) -> None:
        """`batches` of token ids [batch, length], without padding."""
        self.decoder = decoder
        self.stream = first_inputs(decoder, batches)
        self._dense = self._to_the_end(self.stream)

    def divergence(self) -> float:
        """KL(dense || as it is now), in nats a token: the mean over the tokens' predictions; current block onwards."""
        total, tokens = 0.0, 0
        for dense, now in zip(self._dense, self._to_the_end(self.stream), strict=True):
            parts = (hidden.flatten(0, 1).split(POSITIONS_AT_ONCE // 2) for hidden in (dense, now))
            for expected, found in zip(*parts, strict=True):
                # In one product with the head, which is slow for few rows at a time.
                log_p, log_q = self.decoder.logits(torch.cat([expected, found])).log_softmax(-1).chunk(2)
                total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                tokens += len(expected)
        return max(total / tokens, 0.0)

    def divergence_with(self, changes: Sequence[Change]) -> float:
        """The divergence with some layers of the current block changed; they are left as they were."""
        before = [change.undo() for change in changes]
        try:
            for change in changes:
                change.write()
            return self.divergence()
        finally:
            for change in before:
                change.write()

    def advance(self) -> None:
        """Go on to the next block, through the current one as it is now."""
        advance(self.decoder.blocks[self.stream.block], self.stream)

    def _to_the_end(self, stream: Stream) -> list[Tensor]:
        ends = []
        for entry, blocks in zip(stream.hidden, stream.others, strict=True):
            hidden = entry
            for index in range(stream.block, len(self.decoder.blocks)):
                _, hidden = run_block(self.decoder.blocks[index], hidden, blocks[index])
            ends.append(hidden)
        return ends
