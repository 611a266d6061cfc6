"""Factors, eigenvalue bounds and scales of Gram matrices that several solvers share."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.numerics import linalg
from optprune.problems import LayerLoss


@dataclass(frozen=True, eq=False)
class ScaledGram:
    """A_ij / (s_i s_j), s_j^2 = E[x*_j^2] + D_j, and the size of its rounding.

    In these units all entries of A have the same rounding, whatever the units of the inputs. In the original units a
    small input looks like the rounding of a large one.
    """

    gram: Float[Tensor, "in in"]
    """A, as in the loss"""
    scale: Float[Tensor, " in"]
    """s"""
    dtype: torch.dtype
    """the dtype of the scaled matrix and its factors"""
    least: float
    """an eigenvalue of A, or of a block of it, at or below this may be rounding"""
    resolution: float
    """the rounding of an eigenvalue of A, without that of a decomposition in this dtype"""

    @classmethod
    def of(cls, loss: LayerLoss, dtype: torch.dtype = torch.float64) -> "ScaledGram":
        scale = loss.input_scale
        # A damped A is regular by construction: only the rounding of the factorisation counts.
        damped = bool((loss.damping > 0).all())
        least = factor_rounding(len(scale), dtype) + (0.0 if damped else loss.resolution)
        return cls(loss.gram, scale, dtype, least, loss.resolution)

    @cached_property
    def matrix(self) -> Float[Tensor, "in in"]:
        """The scaled A as a whole, for solvers that take many blocks of it."""
        # Divided before it is narrowed: squares of small units leave the range of float32.
        return (self.gram / self.scale[:, None]).div_(self.scale).to(self.dtype)

    def block(self, kept: Int[Tensor, " k"] | None = None) -> Float[Tensor, "k k"]:
        """Return the scaled A of some inputs, or of all, as a fresh matrix stored by columns."""
        gram, scale = self.gram.mT, self.scale
        if kept is not None:
            gram, scale = gram[kept[:, None], kept], scale[kept]
        room = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
        return torch.div(gram, scale, out=room).div_(scale[:, None]).to(self.dtype).mT

    def factor(self, kept: Int[Tensor, " k"] | None = None) -> Float[Tensor, "k k"] | None:
        """Return the Cholesky factor of a block of A; None where an eigenvalue of it may be rounding.

        The block is formed twice, so that at most two copies of it are in memory.
        """
        shifted = self.block(kept)
        shifted.diagonal().sub_(self.least)
        if bool(linalg.cholesky_in_place(shifted)):
            return None
        del shifted
        factor = self.block(kept)
        return None if bool(linalg.cholesky_in_place(factor)) else factor

    @cached_property
    def regular(self) -> bool:
        """Whether A is regular, and so every block of it: the eigenvalues of a block lie between those of A."""
        return bool(exceeds(self.matrix, self.least))

    def factorised(self, blocks: Float[Tensor, "*b n n"]) -> tuple[Float[Tensor, "*b n n"], Bool[Tensor, "*b"]]:
        """Return Cholesky factors of blocks of A, and which blocks are regular: no eigenvalue may be rounding."""
        # A factor with a smaller eigenvalue would invert rounding, and a bound from it would be wrong.
        # A check of all of A may save the checks of the blocks of a batch.
        regular = self.regular if blocks.ndim > 2 and self.regular else exceeds(blocks, self.least)
        factor, failed = linalg.try_cholesky(blocks)
        return factor, (failed == 0) & regular

    def solve_singular(
        self, blocks: Float[Tensor, "*b n n"], right: Float[Tensor, "*b rows n"]
    ) -> Float[Tensor, "*b rows n"]:
        """Return R M^+ for blocks M that may be singular: eigenvalues that are negative or within rounding are zero."""
        values, vectors = linalg.eigh(blocks)
        largest = values.abs().amax(-1)
        rounding = self.resolution + values.shape[-1] * torch.finfo(values.dtype).eps * largest
        usable = values > rounding[..., None]
        inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
        return ((right @ vectors) * inverse[..., None, :]) @ vectors.mT


def exceeds(blocks: Float[Tensor, "*b n n"], least: float) -> Bool[Tensor, "*b"]:
    """Return whether all eigenvalues of symmetric blocks are above `least`: M - least I has a Cholesky factor.

    The pivots of M itself are no test: a pivot may be many times the least eigenvalue, and its rounding
    grows with the condition of the leading block.
    """
    shifted = blocks.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(least)
    return linalg.try_cholesky(shifted)[1] == 0


def factor_rounding(count: int, dtype: torch.dtype) -> float:
    """Return the rounding of the eigenvalues of a matrix with unit diagonal in its Cholesky factors: 2 n eps.

    The errors of the entries are at most n eps, and their sum is no larger unless they all have the same sign.
    """
    return 2 * count * torch.finfo(dtype).eps


def largest_eigenvalue_bound(matrix: Float[Tensor, "n n"], squarings: int = 4) -> float:
    """Return an upper bound of the largest eigenvalue of a positive semidefinite matrix.

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
        size = float(linalg.norm(power))
        power, logarithm = power / size, 2 * logarithm + math.log(size)
    # |A^(2^s)|_F = (sum_i lambda_i^(2^(s+1)))^(1/2), and |power|_F = 1. The last factor covers the rounding.
    return scale * math.exp(logarithm / 2**squarings) * (1 + 1e-5)


def column_steps(gram: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Return 1 / (L A_jj), L a bound of the largest eigenvalue of A with unit diagonal: a safe step for each column.

    For a dead input any step is safe, as it has no curvature; it gets the longest one, because a penalty still acts on
    it.
    """
    scale = column_scale(gram)
    steps = 1 / ((largest_eigenvalue_bound(gram / torch.outer(scale, scale)) or 1.0) * scale.square())
    alive = gram.diagonal() > 0
    return torch.where(alive, steps, steps[alive].max()) if bool(alive.any()) else steps


def column_scale(gram: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Return sqrt(A_jj), with 1 for dead inputs; A divided by it on both sides has a unit diagonal."""
    scale = gram.diagonal().clamp(min=0).sqrt()
    return torch.where(scale > 0, scale, 1.0)
