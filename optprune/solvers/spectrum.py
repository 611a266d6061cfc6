"""Spectral quantities of Gram matrices that several solvers share, each safe for the use it is put to."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def largest_eigenvalue_bound(matrix: Float[Tensor, "n n"], squarings: int = 4) -> float:
    """An upper bound of the largest eigenvalue of a positive semidefinite matrix.

    (tr A^m)^(1/m) with m = 2^(squarings + 1): never below the largest eigenvalue, as a power iteration is, and at
    most n^(1/m) above it; on the decaying spectra of activations within a few percent. Cost: `squarings` products.
    """
    scale = float(matrix.diagonal().sum())
    if scale <= 0:
        return 0.0
    power, logarithm = matrix / scale, 0.0
    for _ in range(squarings):
        # The invariant: (A / scale)^(2^s) = exp(logarithm) * power, kept away from underflow.
        power = power @ power
        size = float(power.norm())
        power, logarithm = power / size, 2 * logarithm + math.log(size)
    # |A^(2^s)|_F = (sum_i lambda_i^(2^(s+1)))^(1/2), and |power|_F = 1. The last factor covers the rounding.
    return scale * math.exp(logarithm / 2**squarings) * (1 + 1e-5)


def column_steps(gram: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """1 / (L A_jj), L a bound of the largest eigenvalue of A scaled to a unit diagonal: a safe step for each column.

    A dead input has no curvature, so that any step is safe: it gets the longest, for a penalty still has to move it.
    """
    scale = column_scale(gram)
    steps = 1 / ((largest_eigenvalue_bound(gram / torch.outer(scale, scale)) or 1.0) * scale.square())
    alive = gram.diagonal() > 0
    return torch.where(alive, steps, steps[alive].max()) if bool(alive.any()) else steps


def column_scale(gram: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """sqrt(A_jj), with 1 for dead inputs: dividing A on both sides by it makes the diagonal 1 and the problem even."""
    scale = gram.diagonal().clamp(min=0).sqrt()
    return torch.where(scale > 0, scale, 1.0)
