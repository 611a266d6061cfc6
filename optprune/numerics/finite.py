"""Whether numbers are finite, asked of large tensors often."""

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Their sum tells in one fast pass: no other value makes up for one that is not. A sum that overflows leaves it open.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
