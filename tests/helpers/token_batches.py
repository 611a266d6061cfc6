"""Token ids to calibrate tiny models with, the same in every test."""

import torch
from torch import Tensor


def batches(count: int = 4, length: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 500, (2, length), generator=generator) for _ in range(count)]
