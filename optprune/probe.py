"""What a change of one block really costs the model: the divergence of its predictions from the dense model's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optprune.models import Decoder
from optprune.models.calibrate import Stream, advance, first_inputs, run_block

POSITIONS_AT_ONCE = 64
"""how many positions' logits are there together, of each of the two models"""


def first_tokens(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first sequences of the batches, as many as hold that many tokens, or all."""
    taken: list[Tensor] = []
    for batch in batches:
        missing = tokens - sum(part.numel() for part in taken)
        if missing > 0:
            taken.append(batch[: -(-missing // batch.shape[1])])
    return taken


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
            parts = (hidden.flatten(0, 1).split(POSITIONS_AT_ONCE) for hidden in (dense, now))
            for expected, found in zip(*parts, strict=True):
                log_p, log_q = (self.decoder.logits(part).log_softmax(-1) for part in (expected, found))
                total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                tokens += len(expected)
        return max(total / tokens, 0.0)

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
