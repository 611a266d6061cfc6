"""Factorisations, norms and a few more functions of torch, and one of scipy, with the types that stubs leave open."""

from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a positive definite matrix."""
    return torch.linalg.cholesky(matrix)


def try_cholesky(matrix: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
    """A Cholesky factor, and a number that is zero where the matrix has one."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return factor, failed


def cholesky_in_place(matrix: Tensor) -> Tensor:
    """Write the lower Cholesky factor over a matrix; a number that is zero where it has one.

    Of a matrix stored by columns it takes one copy beside it, otherwise two.
    """
    failed = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return failed


def by_columns(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a matrix that is stored by columns, as LAPACK wants it."""
    return matrix.mT.to(dtype, copy=True, memory_format=torch.contiguous_format).mT


def eigh_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `eigh`, with the eigenvectors written over the matrix, which is stored by columns."""
    values = matrix.new_empty(matrix.shape[:-1])
    torch.linalg.eigh(matrix, out=(values, matrix))
    return values, matrix


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix, ascending."""
    return torch.linalg.eigvalsh(matrix)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The X of A X = B."""
    return torch.linalg.solve(matrix, right)


def try_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The X of A X = B without a look at the device: no numbers, or large ones, where A is singular."""
    return torch.linalg.solve_ex(matrix, right).result


def try_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a matrix without a look at the device: no numbers, or large ones, where there is none."""
    return torch.linalg.inv_ex(matrix).inverse


def solve_lower(factor: Tensor, right: Tensor) -> Tensor:
    """The X of L X = B for a lower triangular L."""
    return torch.linalg.solve_triangular(factor, right, upper=False)


def pinv(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric matrix."""
    return torch.linalg.pinv(matrix, hermitian=True)


def orthonormal(columns: Tensor, *, whole: bool = False) -> Tensor:
    """Orthonormal columns, the first k of which span what the first k given ones do; with `whole` as many as rows."""
    return torch.linalg.qr(columns, mode="complete" if whole else "reduced")[0]


def norm(values: Tensor, dim: int | None = None) -> Tensor:
    """The Euclidean norms along a dimension, or the one of all values."""
    return values.norm(dim=dim)


def from_numpy(values: "np.ndarray[Any, np.dtype[Any]]") -> Tensor:
    """The same numbers, in the same memory, whatever the default device."""
    return torch.from_numpy(values)


def assignment(gains: Tensor) -> Tensor:
    """The column of each row in the assignment with the largest sum of gains [n, n], on the CPU."""
    _, columns = scipy.optimize.linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return from_numpy(columns)


def unique(values: Tensor) -> Tensor:
    """The distinct values, ascending."""
    return values.unique()


def unique_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of a matrix, and which of them each row is."""
    rows, which = matrix.unique(dim=0, return_inverse=True)
    return rows, which


def numbers(*values: Tensor) -> list[Any]:
    """The values of some tensors without dimensions, of one dtype, at one look at the device."""
    return torch.stack(values).tolist()
