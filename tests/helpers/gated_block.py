"""A small gated block with a third of its weights gone, to be matched with what it was."""

import torch
from torch import nn

from optprune.problems import BlockMatching, Example
from optprune.testing import Listed
from optprune.testing.matching import Gated


def gated() -> BlockMatching:
    generator = torch.Generator().manual_seed(3)
    block, examples = Gated(6, 8, generator), []
    for _ in range(4):
        hidden = torch.randn(1, 12, 6, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            examples.append(Example((hidden,), {}, block(hidden)))
    with torch.no_grad():
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.weight *= torch.rand(part.weight.shape, generator=generator) > 1 / 3
    return BlockMatching.of(block, Listed(tuple(examples)), None, 0.01)
