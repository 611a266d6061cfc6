"""Whether a matrix can be an average of outer products z z^T at all, and what of one has no digits."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import NumericalError

ACCUMULATED = 1e-5
"""the share of its size by which an average of products may be off, collected in float32 in whatever order"""


def check_average(
    matrix: Float[Tensor, "n n"], whole: Float[Tensor, "n n"], unit: float, what: str, source: str
) -> None:
    """NumericalError where a matrix is by more than rounding not symmetric, or not positive semidefinite.

    `whole` is what it is known to a share of: the averages before means or other averages were taken off, whose
    diagonal gives every input its unit. In these units an entry is known to `unit`, and what was added up to it to a
    share ACCUMULATED, which moves no eigenvalue by more than n `unit` + ACCUMULATED x |whole| in the Frobenius norm.
    Costs n^3 / 3 in float64.
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
    """Set variances, and squares of means, to zero where they are too small to have digits; which variances were."""
    limits = torch.finfo(mean.dtype)
    least = limits.tiny / limits.eps
    constant = covariance.diagonal().abs() < least
    covariance[constant] = 0
    covariance[:, constant] = 0
    mean[constant & (mean.square() < least)] = 0
    return constant
