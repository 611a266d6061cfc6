"""Gram matrices X^T X: products on tensor cores, sums, and a check that a matrix can be an average of z z^T."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import BFloat16, Bool, Float, Float32
from torch import Tensor

from optprune.errors import NumericalError
from optprune.numerics.precision import full_precision

PRODUCTS = {1: ((0, 0),), 2: ((0, 0), (0, 1), (1, 1)), 3: ((0, 0), (0, 1), (1, 1), (0, 2))}
"""the products for each number of parts; the product of two different parts is added with its transpose"""


def gram_product(values: Float32[Tensor, "tokens in"], parts: int = 2) -> Float32[Tensor, "in in"]:
    r"""Return X^T X of a float32 matrix by products of bfloat16 matrices: one, three or four for 1, 2 or 3 parts.

    X = H + M + L with H = bf16(X), M = bf16(X - H) and L the rest, which bfloat16 represents except for underflow: it
    has 8 digits, and float32 has 24. So |M| <= 2^-8 |X| and |L| <= 2^-16 |X|, and the terms left out of H^T H,  H^T H +
    H^T M + M^T H + M^T M  and that with H^T L + L^T H is at most 2^-7 + 2^-16, 2^-15 + 2^-32 and 2^-23 + 2^-32 of sum_t
    |x_ti| |x_tj|. The products are exact, so only the sum over tokens in float32 rounds, for each product by a share
    tokens 2^-24 of the same sum (twice that where a tensor core truncates instead of rounding).

    Two parts represent the difference of two bfloat16 numbers of sizes within 2^8 of each other exactly. Any float32
    matrix takes three parts, and so four products: where tensor cores are no more than four times as fast as float32,
    nothing is gained. Activations in float32 are therefore multiplied in float32.
    """
    halves = split(values, parts)
    total = torch.zeros((), dtype=torch.float32, device=values.device)
    # The small terms first.
    for one, other in reversed(PRODUCTS[parts]):
        product = _product(halves[one], halves[other])
        total = total + (product if one == other else product + product.T)
    return total


def split(values: Float32[Tensor, "tokens in"], parts: int) -> list[BFloat16[Tensor, "tokens in"]]:
    """Return bfloat16 matrices that sum to a float32 matrix, each the rounding of the rest after those before it."""
    found = list[Tensor]()
    for _ in range(parts):
        found.append(values.to(torch.bfloat16))
        values = values - found[-1]
    return found


def on_tensor_cores(inputs: Tensor) -> bool:
    """Return whether `gram_product` is used for inputs: for bfloat16 on an NVIDIA GPU."""
    return inputs.dtype == torch.bfloat16 and inputs.device.type == "cuda"


@full_precision()
def _product(one: Tensor, other: Tensor) -> Tensor:
    """Return X^T Y of bfloat16 matrices, summed in float32."""
    if one.device.type == "cuda":
        return torch.mm(one.T, other, out_dtype=torch.float32)
    return one.float().T @ other.float()


STRIPE, LANES = 192, 64
"""the least height of a stripe of rows, and the divisor of every height: products of other sizes are slow, and
round otherwise"""


def packed_zeros(width: int, device: torch.device) -> Float[Tensor, " packed"]:
    """Return an empty sum of products X^T X in float64: the entries right of the diagonal, and some near it."""
    return torch.zeros(packed_size(width), dtype=torch.float64, device=device)


def packed_size(width: int) -> int:
    """Return how many numbers a packed sum has: about half of a matrix."""
    return sum((stripe.stop - stripe.start) * (width - stripe.start) for stripe in stripes(width))


def packed_stripes(packed: Float[Tensor, " packed"], width: int) -> Iterator[tuple[slice, Float[Tensor, "rows right"]]]:
    """Yield the stripes of a packed sum as views: some rows, and their columns from the first of these rows on."""
    begin = 0
    for stripe in stripes(width):
        shape = stripe.stop - stripe.start, width - stripe.start
        yield stripe, packed[begin : begin + math.prod(shape)].view(shape)
        begin += math.prod(shape)


def add_square(total: Float[Tensor, " packed"], rows: Float[Tensor, "tokens n"]) -> None:
    """Add X^T X to a packed sum."""
    for stripe, part in packed_stripes(total, rows.shape[1]):
        part.add_(rows[:, stripe].T @ rows[:, stripe.start :])


def stripes(width: int) -> list[slice]:
    """Return the rows of a matrix in even parts."""
    height = LANES * math.ceil(width / (LANES * max(1, width // STRIPE)))
    return [slice(first, min(first + height, width)) for first in range(0, width, height)]


ACCUMULATED = 1e-5
"""the relative rounding error of an average of products, summed in float32 in any order"""


def check_average(
    matrix: Float[Tensor, "n n"], whole: Float[Tensor, "n n"], unit: float, what: str, source: str
) -> None:
    """Raise NumericalError where a matrix is, beyond rounding, not symmetric or not positive semidefinite.

    `whole` is the matrix to which its rounding is relative: the averages before means or other averages were
    subtracted, whose diagonal gives every input its unit. In these units an entry is known to `unit`, and the sum
    behind it to a share ACCUMULATED, which changes no eigenvalue by more than n `unit` + ACCUMULATED x |whole| in the
    Frobenius norm. Costs n^3 / 3 in float64.
    """
    size = whole.diagonal().double().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    norm = float((whole.double() / size[:, None]).div_(size).norm())
    scaled = (matrix.double() / size[:, None]).div_(size)
    uneven = float((scaled - scaled.T).abs().max())
    if uneven > 2 * (unit + ACCUMULATED):
        raise NumericalError(
            f"{what} is not symmetric: in units of its diagonal two entries that should be equal differ by "
            f"{uneven:.3g}; {source}"
        )
    slack = len(scaled) * unit + ACCUMULATED * norm
    scaled.diagonal().add_(slack)
    if int(torch.linalg.cholesky_ex(scaled).info):
        least = float(torch.linalg.eigvalsh(scaled)[0]) - slack
        raise NumericalError(
            f"{what} is indefinite: scaled to a unit diagonal its least eigenvalue is {least:.3g}, which rounding does "
            f"not explain; {source}"
        )


def clear_small(covariance: Float[Tensor, "in in"], mean: Float[Tensor, "in"]) -> Bool[Tensor, "in"]:
    """Set variances and means to zero where their squares are too small to have digits; return which variances."""
    limits = torch.finfo(mean.dtype)
    least = limits.tiny / limits.eps
    constant = covariance.diagonal().abs() < least
    covariance[constant] = 0
    covariance[:, constant] = 0
    mean[constant & (mean.square() < least)] = 0
    return constant
