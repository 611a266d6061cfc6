"""A walk through a model block by block, as calibration goes."""

import torch
from torch import Tensor

from optprune.calibration import calibrating, first_inputs
from optprune.calibration.stream import advance
from optprune.models import Decoder


def logits_block_by_block(decoder: Decoder, tokens: Tensor) -> torch.Tensor:
    """The logits of what leaves the last block, where each block gets what the walk hands it."""
    with calibrating(decoder):
        stream = first_inputs(decoder, [tokens])
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                advance(block, stream)
        return decoder.logits(stream.hidden[0])
