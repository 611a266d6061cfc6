"""Spectral quantities of Gram matrices that several solvers share, each safe for the use it is put to."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import NumericalError
from optprune.problems import LayerLoss

INDEFINITE = 1e-5
"""a negative eigenvalue above this share of the largest is no rounding of a float32 Gram matrix"""


@dataclass(frozen=True, eq=False)
class ScaledGram:
    """A_ij / (s_i s_j), s_j^2 = E[x*_j^2] + D_j, and what is rounding of it.

    In these units every entry of A is known to the same size, whatever the units of the inputs. In the given ones a
    small input looks like the rounding of a large one.
    """

    matrix: Float[Tensor, "in in"]
    scale: Float[Tensor, " in"]
    least_pivot: float
    """a smaller pivot of a Cholesky factor could be nothing but rounding"""
    resolution: float
    """an eigenvalue of A is known to this; that of a decomposition in this dtype comes on top"""

    @classmethod
    def of(cls, loss: LayerLoss, dtype: torch.dtype = torch.float64) -> "ScaledGram":
        # Divided before it is narrowed: squares of small units leave the range of float32.
        scale = loss.input_scale
        matrix = (loss.gram / scale[:, None]).div_(scale).to(dtype)
        # A damped A is regular by construction: only what the factorisation itself rounds is in doubt.
        damped, unit = bool((loss.damping > 0).all()), torch.finfo(dtype).eps
        least_pivot = unit if damped else max(loss.resolution, len(scale) * unit)
        return cls(matrix, scale, least_pivot, loss.resolution)

    def regular(self, factor: Float[Tensor, "*b n n"], failed: Tensor) -> Bool[Tensor, "*b"]:
        """Whether the Cholesky factors of some blocks have no pivot that could be rounding."""
        # A factor whose pivots are rounding would invert rounding, and claim a bound that is none.
        return (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).square().amin(-1) > self.least_pivot)

    def solve_singular(
        self, blocks: Float[Tensor, "*b n n"], right: Float[Tensor, "*b rows n"]
    ) -> Float[Tensor, "*b rows n"]:
        """R M^+ for blocks M that may be singular: eigenvalues that may be rounding are zero.

        NumericalError if one is clearly indefinite.
        """
        values, vectors = torch.linalg.eigh(blocks)
        largest = values.abs().amax(-1)
        rounding = self.resolution + values.shape[-1] * torch.finfo(values.dtype).eps * largest
        excess = values[..., 0] + rounding.maximum(INDEFINITE * largest)
        if bool((excess < 0).any()):
            worst = values.reshape(-1, values.shape[-1])[excess.argmin()]
            raise NumericalError(
                f"the Gram matrix is indefinite: scaled to a unit diagonal its least eigenvalue is "
                f"{worst[0].item():.3g} and its largest {worst[-1].item():.3g}; collect it again, or raise the damping "
                "above that"
            )
        usable = values > rounding[..., None]
        inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
        return ((right @ vectors) * inverse[..., None, :]) @ vectors.mT


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
