"""Factorisations, norms and other functions of torch and scipy, with complete types."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a positive definite matrix."""
    return torch.linalg.cholesky(matrix)


def try_cholesky(matrix: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
    """Return a Cholesky factor, and a number that is zero where the matrix has one."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return factor, failed


def cholesky_in_place(matrix: Tensor) -> Tensor:
    """Write the lower Cholesky factor over a matrix, and return a number that is zero where it has one.

    A matrix stored by columns takes one copy beside it, others two.
    """
    failed = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return failed


def by_columns(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a matrix that is stored by columns, as LAPACK needs it."""
    return matrix.mT.to(dtype, copy=True, memory_format=torch.contiguous_format).mT


def eigh_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `eigh`, with the eigenvectors written over the matrix, which is stored by columns."""
    values = matrix.new_empty(matrix.shape[:-1])
    torch.linalg.eigh(matrix, out=(values, matrix))
    return values, matrix


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of a symmetric matrix, ascending."""
    return torch.linalg.eigvalsh(matrix)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the X of A X = B."""
    return torch.linalg.solve(matrix, right)


def try_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the X of A X = B without a check on the device: NaN, infinity or large numbers where A is singular."""
    return torch.linalg.solve_ex(matrix, right).result


def try_inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a matrix without a check on the device: NaN, infinity or large numbers if there is none."""
    return torch.linalg.inv_ex(matrix).inverse


def solve_lower(factor: Tensor, right: Tensor) -> Tensor:
    """Return the X of L X = B for a lower triangular L."""
    return torch.linalg.solve_triangular(factor, right, upper=False)


def solve_upper(factor: Tensor, right: Tensor) -> Tensor:
    """Return the X of R X = B for an upper triangular R."""
    return torch.linalg.solve_triangular(factor, right, upper=True)


def pinv(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix."""
    return torch.linalg.pinv(matrix, hermitian=True)


def orthonormal(columns: Tensor, *, whole: bool = False) -> Tensor:
    """Return orthonormal columns, the first k of which have the span of the first k given ones; a basis if `whole`."""
    return torch.linalg.qr(columns, mode="complete" if whole else "reduced")[0]


def qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reduced QR factors: orthonormal columns of the same span, and an upper triangular matrix."""
    basis, factor = torch.linalg.qr(columns)
    return basis, factor


def upper_factor(columns: Tensor) -> Tensor:
    """Return an upper triangular R with R^T R = C^T C, which needs no product and has its precision."""
    return torch.linalg.qr(columns, mode="r").R


def norm(values: Tensor, dim: int | None = None) -> Tensor:
    """Return the Euclidean norms along a dimension, or that of all values."""
    return values.norm(dim=dim)


def from_numpy(values: "np.ndarray[Any, np.dtype[Any]]") -> Tensor:
    """Return an array as a tensor in the same memory, for every default device."""
    return torch.from_numpy(values)


def assignment(gains: Tensor) -> Tensor:
    """Return the column of each row in the assignment with the largest sum of gains [n, n], on the CPU."""
    _, columns = scipy.optimize.linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return from_numpy(columns)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix with the blocks [n, a, b] on its diagonal, [n a, n b]."""
    count, rows, columns = blocks.shape
    matrix = blocks.new_zeros(count, rows, count, columns)
    every = torch.arange(count, device=blocks.device)
    matrix[every, :, every] = blocks
    return matrix.reshape(count * rows, count * columns)


def descended(loss: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Return where BFGS ends from a start, for a function that returns the loss and its gradient; in float64."""

    def flat(values: "np.ndarray[Any, np.dtype[Any]]") -> tuple[float, Any]:
        value, gradient = loss(from_numpy(values).to(start).reshape(start.shape))
        return float(value), gradient.flatten().cpu().numpy()

    minimize: Any = vars(scipy.optimize)["minimize"]
    found = minimize(flat, start.flatten().cpu().numpy(), jac=True, method="BFGS")
    return from_numpy(found.x).to(start).reshape(start.shape)


def unique(values: Tensor) -> Tensor:
    """Return the distinct values, ascending."""
    return values.unique()


def unique_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a matrix, and the index among them of each row."""
    rows, which = matrix.unique(dim=0, return_inverse=True)
    return rows, which


def numbers(*values: Tensor) -> list[Any]:
    """Return the values of tensors without dimensions, of one dtype, by one read from the device."""
    return torch.stack(values).tolist()
