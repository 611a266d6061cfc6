"""What runs of tiny models are compared by: few tokens, and whether two models hold the same numbers."""

import torch
from torch import Tensor, nn


def batches(seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 500, (4, 32), generator=generator) for _ in range(2)]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
