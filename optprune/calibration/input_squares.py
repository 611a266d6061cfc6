"""Mean squares of the inputs of layers in the dense model: the diagonals of their Gram matrices, without the rest."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.stream import advance, calibrating, first_inputs
from optprune.models import Decoder


def mean_squares(decoder: Decoder, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean square of each input [in] of every linear layer of the blocks, float64, by the layer's name.

    `batches` are token ids [batch, length]. The mean is over the tokens that the layer sees: of an expert, those that
    are routed to it. A layer without a token has zeros. Blocks from a store are in memory one at a time.
    """
    found = dict[str, Tensor]()
    with calibrating(decoder):
        stream = first_inputs(decoder, batches)
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                sums = {path: _Sums(decoder.layer(index, path).in_features) for path in decoder.paths(index)}
                handles = [
                    block.get_submodule(path).register_forward_pre_hook(partial(_add, own))
                    for path, own in sums.items()
                ]
                try:
                    advance(block, stream)
                finally:
                    for handle in handles:
                        handle.remove()
            found |= {decoder.name(index, path): own.squares / max(own.tokens, 1) for path, own in sums.items()}
    return found


class _Sums:
    """Sums over the tokens that a layer has seen."""

    def __init__(self, width: int) -> None:
        self.squares, self.tokens = torch.zeros(width, dtype=torch.float64), 0


def _add(own: _Sums, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    own.squares += rows.double().square().sum(0).cpu()
    own.tokens += len(rows)
