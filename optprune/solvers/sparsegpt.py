"""SparseGPT: columns from left to right in blocks, each error compensated by the columns that follow."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import NumericalError
from optprune.numerics import linalg
from optprune.patterns import NM, RowWise, Unstructured, largest
from optprune.problems import SparseLeastSquares
from optprune.solvers.base import Answer, DirectSolver, check_options, measuring
from optprune.solvers.inverse import inverse_gram
from optprune.work import Work, factor, inverse, product, storage


@final
@dataclass(frozen=True)
class SparseGpt(DirectSolver[SparseLeastSquares]):
    r"""Optimal-brain-surgeon updates with a fixed order of columns.

    With U the upper Cholesky factor of A^-1 = U^T U, for each column j in turn, masks being chosen when a block
    (or an N:M group) is reached, by the saliency v_ij^2 / U_jj^2:

        e = v_j / U_jj where the mask drops v_j, else 0;   V[:, j:] -= e U[j, j:]

    It starts from the unpruned minimiser B A^-1 (which is W when x* = x); the start is not used. Accepts sparse
    least squares with an unstructured, row-wise or N:M pattern; each block keeps its share of the count, so that
    the total is exact. The damping is that of the loss (the paper: 1 percent); where A is not positive definite
    by more than rounding it raises NumericalError instead of going on with another matrix.

    Cost: in^3 + out in^2; memory 2 in^2 + 2 out in; two kernels per column, four per group of N:M, one read from the
    device per block. Reference: SparseGPT (arXiv 2301.00774), Algorithm 1.
    """

    accepts = (SparseLeastSquares,)

    block: int = 128

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # Updates within a block go column by column, at the speed of memory.
        updates = (1 + 12 * self.block / 128) * product(outputs, inputs, inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + 2 * factor(inputs) + inverse(inputs) + updates
        return Work(flops, storage(outputs, inputs, 24.3, 20.5, 7.4))

    def unsupported(self, problem: SparseLeastSquares) -> str | None:
        pattern = problem.pattern
        if not isinstance(pattern, Unstructured | RowWise | NM):
            return f"it chooses masks block by block, which it cannot for the pattern {type(pattern).__name__}"
        if problem.loss.coupled:
            return "it compensates errors row by row, and the full output metric couples the rows: take its diagonal"
        return None

    def answer(self, problem: SparseLeastSquares, start: Tensor) -> Answer:
        pattern = problem.pattern
        assert isinstance(pattern, Unstructured | RowWise | NM)
        inverse, weight = inverse_gram(problem.loss)
        factor, failed = linalg.try_cholesky(inverse, upper=True)
        if bool(failed):
            raise NumericalError(
                "the inverse Gram matrix is not positive definite in this precision: raise the damping"
            )
        width = weight.shape[1]
        saliency = factor.diagonal().square()
        size = self.block if not isinstance(pattern, NM) else max(1, self.block // pattern.m) * pattern.m
        for first in range(0, width, size):
            last = min(first + size, width)
            inner, local = weight[:, first:last], factor[first:last, first:last]
            errors = torch.empty_like(inner)
            # U_jj where the mask drops, and infinity where it keeps: the error there is zero.
            divisors = local.diagonal().expand_as(inner).clone()
            if not isinstance(pattern, NM):
                score = inner.square() / saliency[first:last]
                divisors.masked_fill_(_block_mask(pattern, score, first, last, width), torch.inf)
            for j in range(last - first):
                if isinstance(pattern, NM) and j % pattern.m == 0:
                    group = slice(j, j + pattern.m)
                    score = inner[:, group].square() / saliency[first:last][group]
                    # Of equal scores the first stays, as in every pattern.
                    kept = score.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
                    divisors[:, group].scatter_(1, kept, torch.inf)
                error = torch.div(inner[:, j], divisors[:, j], out=errors[:, j])
                inner[:, j:].addr_(error, local[j, j:], alpha=-1)
            # The update has left rounding in place of zeros.
            inner.masked_fill_(divisors < torch.inf, 0)
            weight[:, last:] -= errors @ factor[first:last, last:]
        return Answer(weight.to(problem.loss.weight))


def _block_mask(
    pattern: Unstructured | RowWise, score: Float[Tensor, "out block"], first: int, last: int, width: int
) -> Bool[Tensor, "out block"]:
    """Return the mask of a block with its share of the count; the shares sum exactly to the whole."""
    keep = pattern.keep * last // width - pattern.keep * first // width
    if isinstance(pattern, RowWise):
        return largest(score, keep)
    return Unstructured(keep).project(score)
