"""Proven bounds of the rounding errors of float64, for certificates.

Each holds for every order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
sections 3.1 and 10.1; Rump, Verification of Positive Definiteness, BIT 46, 2006).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.numerics import linalg

UNIT = torch.finfo(torch.float64).eps / 2
"""the largest relative error of one float64 operation"""
OUTWARD = 1.01
"""the factor of an error bound, because the bound itself is computed in float64"""
SHIFTS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-13, 1e-14)
"""the lower bounds of the least eigenvalue that are tried, for a matrix with a unit diagonal"""
LARGEST_RIDGE = 1e-3
"""the largest ridge that makes a matrix regular, as a share of its unit diagonal"""


def gamma(terms: int, unit: float = UNIT) -> float:
    """Return the error bound of a sum of so many products, relative to the sum of their sizes."""
    return OUTWARD * terms * unit


@dataclass(frozen=True, eq=False)
class KnownMatrix:
    """A symmetric matrix in float64, and a bound of its distance from the exact matrix."""

    matrix: Float[Tensor, "n n"]
    size: Float[Tensor, " n"]
    """s, the roots of the exact diagonal, 0 where the exact row is zero"""
    ratio: float
    """|M_ij| is at most this times s_i s_j"""
    share: float
    """the exact entry differs from M_ij by at most this times s_i s_j"""

    @classmethod
    def of(
        cls, average: Float[Tensor, "n n"], damping: Float[Tensor, " n"], mean: Float[Tensor, " n"] | None = None
    ) -> "KnownMatrix":
        """Return the sum C + m m^T + diag(D) of stored parts, in any dtype, which count as exact.

        Where C is not exactly symmetric either triangle may be meant, so their difference counts as an error.
        """
        first, ridge = average.double(), damping.double()
        centre = torch.zeros_like(ridge) if mean is None else mean.double()
        size = (first.diagonal() + centre.square() + ridge).clamp(min=0).sqrt()
        unit = torch.where(size > 0, size, 1.0)
        uneven = float(((first - first.mT).abs_() / unit).div_(unit[:, None]).max())
        matrix = torch.addr(first, centre, centre)
        parts = torch.addr(first.abs(), centre.abs(), centre.abs())
        for each in (matrix, parts):
            each.diagonal().add_(ridge)
        nothing = size == 0
        ratio = float("inf") if bool(parts[nothing].any()) else float((parts / unit).div_(unit[:, None]).max())
        return cls(matrix, size, OUTWARD * ratio, OUTWARD * (5 * UNIT * ratio + uneven))

    @cached_property
    def unit(self) -> Float[Tensor, " n"]:
        """s, with 1 in place of 0."""
        return torch.where(self.size > 0, self.size, 1.0)

    @cached_property
    def scaled(self) -> Float[Tensor, "n n"]:
        """M_ij / (s_i s_j), with 1 on the diagonal of rows that are zero."""
        scaled = (self.matrix / self.unit[:, None]).div_(self.unit)
        scaled.diagonal().add_((self.size == 0).to(scaled))
        return scaled

    @cached_property
    def margin(self) -> float:
        """The least computed eigenvalue of the scaled matrix that proves it positive definite.

        n times the error of an entry, and the backward error of a Cholesky factorisation, gamma of the trace.
        """
        count = len(self.matrix)
        return OUTWARD * count * (self.share + 3 * UNIT * self.ratio) + gamma(count + 3) * 2 * count * self.ratio

    def exceeds(self, diagonal: Float[Tensor, "*n"] | float) -> bool:
        """Return whether the exact matrix is proved to exceed diag(d s^2), for a d of nonnegative entries."""
        if not self.margin < 1:
            return False
        shifted = self.scaled.clone()
        shifted.diagonal().sub_(diagonal).sub_(self.margin)
        return bool(torch.isfinite(shifted).all()) and not bool(linalg.cholesky_in_place(shifted))

    def floor(self, damping: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"] | None:
        """Return a d [n] whose diag(d) the exact matrix exceeds: nearly the damping, or a least eigenvalue.

        It is in the units of the matrix, and positive except for zero rows; None where the other rows cannot be told
        from those of a singular one.
        """
        square = self.size.square()
        if damping is not None and bool((damping > 0).all()):
            share = damping.double() / square
            for most in (0.99, 0.5):
                if self.exceeds(most * share):
                    return most * (1 - 4 * UNIT) * damping.double()
        found = next((shift for shift in SHIFTS if self.exceeds(shift)), 0.0)
        return (1 - 4 * UNIT) * found * square if found else None

    def regularised(self) -> "tuple[KnownMatrix, float]":
        """Return the matrix with a ridge of r s^2 that makes it regular by r / 2, and r; infinite where none does."""
        ridge = 8 * self.margin
        while ridge <= LARGEST_RIDGE:
            matrix = self.matrix.clone()
            matrix.diagonal().add_(ridge * self.size.square())
            size = self.size * (1 + ridge) ** 0.5
            other = replace(self, matrix=matrix, size=size, share=self.share + 4 * UNIT * self.ratio)
            if other.exceeds(ridge / 2):
                return other, ridge
            ridge *= 8
        return self, float("inf")

    def among(self, kept: Bool[Tensor, " n"]) -> "KnownMatrix":
        """Return the matrix of some rows and columns alone."""
        return replace(self, matrix=self.matrix[kept][:, kept], size=self.size[kept])
