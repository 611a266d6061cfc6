"""A diagonal to split off a positive definite matrix, with as large a weighted trace as can be."""

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import UNIT, KnownMatrix
from optprune.solvers.spectrum import largest_eigenvalue_bound

ACCURACY = 1e-2
"""the share of the weighted trace by which the diagonal may fall short of the best one"""
MOST_STEPS = 60
"""Newton steps"""
SHRUNK = (1.0, 1 - 1e-8, 1 - 1e-5, 1 - 1e-3, 0.9, 0.5)
"""what the diagonal is multiplied by, in turn, until it is proved that it can be split off"""


def split_off(known: KnownMatrix, weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return a d of nonnegative entries, in the units of the matrix M, for which M >= diag(d) is proved.

    In units in which M has a unit diagonal it nearly maximises sum_j q_j d_j, for positive weights q: Newton steps on
    the barrier sum_j q_j d_j + m (log det(M - diag(d)) + sum_j log d_j) with m going to zero, as in minimum trace
    factor analysis. Zero where M cannot be told from a singular matrix. A step costs about 2 n^3.
    """
    scaled = known.scaled
    factor, failed = linalg.try_cholesky(scaled)
    if bool(failed) or not known.margin < 1:
        return torch.zeros_like(weights)
    inverse = torch.cholesky_inverse(factor)
    diagonal = inverse.diagonal()
    inverse = inverse * torch.outer(diagonal.rsqrt(), diagonal.rsqrt())
    split = 0.5 / (largest_eigenvalue_bound(inverse) * diagonal)
    barrier = float((weights * split).sum()) / len(split)
    for _ in range(MOST_STEPS):
        found = _newton(scaled, weights, split, barrier)
        if found is None:
            break
        split, decrement = found
        if decrement > 0.1 * barrier * len(split):
            continue
        if barrier * len(split) <= ACCURACY * float((weights * split).sum()):
            break
        barrier /= 5
    shrunk = next((share for share in SHRUNK if known.exceeds(share * split)), 0.0)
    return (1 - 4 * UNIT) * shrunk * split * known.size.square()


def _newton(
    scaled: Float[Tensor, "n n"], weights: Float[Tensor, " n"], split: Float[Tensor, " n"], barrier: float
) -> tuple[Float[Tensor, " n"], float] | None:
    """A damped Newton step from within, and what it promised to gain, twice; None where float64 has no digits left."""
    factor, failed = linalg.try_cholesky(scaled - torch.diag(split))
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(factor)
    slope = weights - barrier * inverse.diagonal() + barrier / split
    curvature = inverse.square_().mul_(barrier)
    curvature.diagonal().add_(barrier / split.square())
    factor, failed = linalg.try_cholesky(curvature)
    if bool(failed):
        return None
    step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
    decrement, length = float(slope @ step), 1.0
    while length > 1e-9:
        trial = split + length * step
        inside = bool((trial > 0).all()) and not bool(linalg.try_cholesky(scaled - torch.diag(trial))[1])
        if inside:
            break
        length /= 2
    # Short of the boundary, where the barrier is infinite.
    return split + (1.0 if length == 1 else 0.9 * length) * step, decrement
