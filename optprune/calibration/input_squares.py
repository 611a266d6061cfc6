"""Mean squares of the inputs of layers in the dense model: the diagonals of their Gram matrices, without the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optprune.calibration.stream import advance, calibrating, first_inputs
from optprune.models import Decoder


def mean_squares(decoder: Decoder, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean square of each input [in] of every linear layer of the blocks, float64, by the layer's name.

    `batches` are token ids [batch, length]. The mean is over the tokens that the layer sees: of an expert, those that
    are routed to it. A layer without a token has zeros. Blocks from a store are in memory one at a time.
    """
    found, taps = dict[str, Tensor](), decoder.architecture.taps
    with calibrating(decoder):
        stream = first_inputs(decoder, batches)
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                paths = decoder.paths(index)
                # Layers that read the same input share a tap.
                sums = {taps[path]: _Sums(decoder.layer(index, path).in_features) for path in paths}

                def add(inputs: dict[str, Tensor], sums: dict[str, _Sums] = sums) -> None:
                    for tap, rows in inputs.items():
                        sums[tap].add(rows.flatten(0, -2))

                advance(block, stream, list(sums), add)
            means = {tap: own.squares / max(own.tokens, 1) for tap, own in sums.items()}
            found |= {decoder.name(index, path): means[taps[path]] for path in paths}
    return found


class _Sums:
    """Sums over the tokens that a layer has seen."""

    def __init__(self, width: int) -> None:
        self.squares, self.tokens = torch.zeros(width, dtype=torch.float64), 0

    def add(self, rows: Tensor) -> None:
        """Add the inputs [tokens, in] of some tokens."""
        self.squares += rows.double().square().sum(0).cpu()
        self.tokens += len(rows)
