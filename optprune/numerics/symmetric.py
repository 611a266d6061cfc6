"""Sums of products X^T X, which are symmetric: little more than half of each is formed."""

import math

from jaxtyping import Float
from torch import Tensor

STRIPE, LANES = 192, 64
"""the least height of a stripe of rows, and what every height is a multiple of: products of other sides are slow, and
round otherwise"""


def add_square(total: Float[Tensor, "n n"], rows: Float[Tensor, "tokens n"]) -> None:
    """Add X^T X to a sum whose entries left of the diagonal, but for some near it, are not kept: see `mirror`."""
    for stripe in _stripes(len(total)):
        total[stripe, stripe.start :].add_(rows[:, stripe].T @ rows[:, stripe.start :])


def mirror(total: Float[Tensor, "n n"]) -> None:
    """Give a sum of squares, in place, the entries that `add_square` does not keep."""
    for stripe in _stripes(len(total)):
        total[stripe.stop :, stripe] = total[stripe, stripe.stop :].T


def _stripes(width: int) -> list[slice]:
    """The rows of a matrix in even parts."""
    height = LANES * math.ceil(width / (LANES * max(1, width // STRIPE)))
    return [slice(first, min(first + height, width)) for first in range(0, width, height)]
