"""The k-th largest value by bisection on the bits: a few counts over all values, for devices that sort slowly."""

import torch
from jaxtyping import Float
from torch import Tensor

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""the integers that share the size of a float"""


def kth_largest(score: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows 1"]:
    """The k-th largest value of every row, of numbers that are not NaN: exactly that value, whatever is tied with it.

    As integers the bits of floats that are not negative have their order, and those of negative ones the opposite. One
    count for each bit, from the sign on, tells whether it is set in the answer; nothing waits for the device.
    """
    kind = INTEGERS[score.dtype]
    most = torch.iinfo(kind).max
    # Adding zero makes the negative zero a positive one.
    bits = (score + 0.0).view(kind)
    keys = torch.where(bits < 0, bits ^ most, bits)
    found = torch.full_like(keys[:, :1], torch.iinfo(kind).min)
    for place in range(torch.iinfo(kind).bits - 1, -1, -1):
        # The sign's place takes the least integer to zero.
        trial = torch.zeros_like(found) if place == torch.iinfo(kind).bits - 1 else found + (1 << place)
        enough = (keys >= trial).sum(1, keepdim=True) >= k
        found = torch.where(enough, trial, found)
    return torch.where(found < 0, found ^ most, found).view(score.dtype)
