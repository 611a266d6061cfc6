"""Restoration in closed form: the best weights on a fixed mask, with its certificate from the normal equations."""

import math
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics import linalg
from optprune.problems import MaskedLeastSquares, Problem, SelectionProblem
from optprune.solvers.base import Answer, Certificate, DirectSolver, measuring
from optprune.solvers.spectrum import ScaledGram, factor_rounding
from optprune.solvers.verified import VerifiedLoss
from optprune.system.wording import shown
from optprune.work import Work, factor, product, storage, sweeps

SINGULAR = (
    "singular Gram matrix on the kept inputs: the solution nearest the original weights, each measured by the size of "
    "its input, was taken (pseudo-inverse)"
)
COUPLED = (
    "it solves row by row, and the full output metric couples rows whose masks differ: take ConjugateGradients, or the "
    "diagonal of the metric"
)
Restorable: TypeAlias = MaskedLeastSquares | SelectionProblem
"""a problem with a mask, or one whose start determines a mask"""
BATCH_BYTES = 1 << 28
"""the memory of one batch of rows where every row has its own mask"""
MOST_FACTORS = 1e12
"""the most multiplications of proving every row's matrix regular where A is not"""
ROWS = 512
"""the number of rows with the same mask that are solved at a time"""
KEPT = 0.75
"""the share of kept inputs that the plan assumes"""


@final
@dataclass(frozen=True)
class Restore(DirectSolver[Restorable]):
    r"""Solve the normal equations on the mask, as a change Z of the masked weight U = W * mask:

        (G_U + Z A)_M = 0,   G_U = (U - W) A + (W A - B),   Z_M = -(G_U)_M (A_MM)^-1,   Z = 0 outside M.

    Accepts restoration problems, and selection problems, where it refits on the support of the start. One Cholesky
    factor serves all rows that share a mask; other rows are factorised in batches. Units are those in which A has a
    unit diagonal, s_j^2 = E[x*_j^2] + D_j, so that a small input is not mistaken for rounding of a large one. Where
    A_MM is singular (fewer tokens than inputs and no damping), the minimiser with the least sum_j s_j^2 Z_ij^2 in every
    row, which does not depend on units, is taken by an eigendecomposition, with a note; dead inputs are unchanged. A
    start that is still better, by eigenvalues of A within rounding, is returned unchanged.

    A full output metric has no effect where all rows share the mask, because S is a factor of the normal equations, and
    couples the rows otherwise; such problems are refused.

    Promises the optimum of a restoration problem, by factors in float64; float32 ones promise nothing. Certifies it
    (`restored_bound`): with r the residual of the normal equations at the answer, f(V) - min f <= 1/2 tr(r (A_MM)^-1
    r^T). Where A_MM cannot be told from a singular matrix, other weights may cost less within rounding: nothing is
    proved.
    Cost: 2 in^3 / 3 + 2 out in^2, one third of in^3 of it to know that A_MM is regular; with a mask for every row out
    in^3 / 3, or twice that where A itself is singular (`choose` then prefers gradients). Memory 2 in^2 in
    `factor_dtype`, whatever the dtype of the problem.
    Reference: FASP (arXiv 2501.09412), restoration; the ridge towards W instead of zero is ours.
    """

    accepts = (MaskedLeastSquares, SelectionProblem)

    factor_dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.factor_dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"factor_dtype of {self.label} must be torch.float32 or torch.float64, not {shown(self.factor_dtype)}"
            )

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # One mask for all rows that keeps KEPT of the inputs; `choose` prefers gradients for large masks per row.
        kept = round(KEPT * inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + 2 * factor(kept) + 4 * product(outputs, kept, kept)
        form = (16.9, 55.5, 25.0) if coupled else (15.2, 34.7, 1.2)
        return Work(flops + sweeps(70, outputs, inputs), storage(outputs, inputs, *form))

    def unsupported(self, problem: Restorable) -> str | None:
        coupled = problem.loss.coupled and fixed_mask(problem, problem.loss.weight).shape[0] > 1
        return COUPLED if coupled else None

    def exact(self, problem: Restorable) -> bool:
        return isinstance(problem, MaskedLeastSquares) and self.factor_dtype == torch.float64

    def monotone(self, problem: Restorable) -> bool:
        return self.factor_dtype == torch.float64

    def answer(self, problem: Restorable, start: Tensor) -> Answer:
        masked = isinstance(problem, MaskedLeastSquares)
        found = self._restore(problem if masked else problem.restrict(problem.support(start)))
        if found.notes and _is_better(problem, start, found.value):
            return replace(found, value=start.clone())
        return found

    def prove(self, problem: Restorable, value: Tensor) -> Certificate | None:
        # A bound for a choice would hold for this choice only, not for the best one.
        return restored_bound(problem, value) if isinstance(problem, MaskedLeastSquares) else None

    def _restore(self, problem: MaskedLeastSquares) -> Answer:
        value, gram = problem.start(), ScaledGram.of(problem.loss, self.factor_dtype)
        change, singular = _newton_step(gram, problem.loss.residual(value), problem.mask, value.dtype)
        value = change.add_(value)
        return Answer(value, notes=(SINGULAR,) if singular else ())


def _is_better(problem: Problem, start: Tensor, found: Tensor) -> bool:
    """Return whether a feasible start is better by more than rounding: it then uses directions that were cut off."""
    if problem.violation(start) > 0:
        return False
    return problem.objective(start) < problem.objective(found) - problem.loss.rounding(found)


def fixed_mask(problem: Restorable, start: Tensor) -> Bool[Tensor, "rows in"]:
    """Return the mask of a restoration problem, or of the support of a selection problem's start."""
    if isinstance(problem, MaskedLeastSquares):
        return problem.mask
    return problem.mask(problem.support(start))


def restored_bound(problem: MaskedLeastSquares, value: Float[Tensor, "out in"]) -> Certificate | None:
    """Return a lower bound on the optimum of a restoration problem from any answer, tight near the optimum.

    Return None where A or S cannot be told from a singular matrix on the mask.
    """
    loss, mask = problem.loss, problem.mask
    verified = VerifiedLoss.of(loss)
    rows, columns = verified.floor_of_rows, _floors(verified, mask)
    if rows is None or columns is None:
        return None
    change = torch.where(mask, value.double() - verified.weight, -verified.weight)
    if not bool((loss.damping > 0).all()):
        # A small eigenvalue amplifies the rounding of an answer in a narrow dtype: the bound is taken after another
        # step.
        size = verified.inputs.unit
        exact = ScaledGram(verified.inputs.matrix, size, size.dtype, factor_rounding(len(size), size.dtype), 0.0)
        residual = change @ exact.gram if loss.exact.pull is None else change @ exact.gram + loss.exact.pull
        change = change + _newton_step(exact, residual, mask, change.dtype)[0]
    bound = verified.least(change, rows[:, None] * columns, mask=mask)
    # No loss is negative, so zero is a lower bound too; a bound that is not finite proves nothing.
    return Certificate(bound if 0 < bound < math.inf else 0.0, "residual of the normal equations")


def _floors(verified: VerifiedLoss, mask: Bool[Tensor, "rows in"]) -> Float[Tensor, "rows in"] | None:
    """Return a diagonal d for each mask, with A >= diag(d) on it; None where it is not proved, or takes too long.

    A full metric S >= diag(s) makes tr(Z A Z^T S) at least the sum of s_i z_i A z_i^T over the rows z_i of Z only where
    A has no negative eigenvalue on all of their masks together, so with different masks A as a whole must exceed it.
    """
    whole = verified.floor_of_columns
    if whole is not None:
        return whole.expand(mask.shape)
    different, which = linalg.unique_rows(mask)
    if len(different) * mask.shape[1] ** 3 > MOST_FACTORS or (verified.outputs is not None and len(different) > 1):
        return None
    floors = torch.ones_like(different, dtype=torch.float64)
    for kept, floor in zip(different, floors, strict=True):
        found = verified.inputs.among(kept).floor() if bool(kept.any()) else floor[kept]
        if found is None:
            return None
        floor[kept] = found
    return floors[which]


def _newton_step(
    gram: ScaledGram, residual: Float[Tensor, "out in"], mask: Bool[Tensor, "rows in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "out in"], bool]:
    """Return -(G_M A_MM^-1) on the mask and zero elsewhere, in a dtype, and whether some A_MM was singular."""
    if mask.shape[0] == 1:
        return _shared_step(gram, residual, mask[0], dtype)
    step, singular = _row_steps(gram, (residual / gram.scale).to(gram.dtype), mask)
    return (step / gram.scale).to(dtype), singular


def _shared_step(
    gram: ScaledGram, residual: Float[Tensor, "out in"], mask: Bool[Tensor, " in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "out in"], bool]:
    step = torch.zeros_like(residual, dtype=dtype)
    kept = mask.nonzero()[:, 0]
    if kept.numel() == 0:
        return step, False
    factor, scale = gram.factor(kept), gram.scale[kept]
    singular = factor is None
    # A few rows at a time, because of the memory in the factor's dtype.
    every = torch.arange(len(residual), device=kept.device)
    for rows in torch.split(every, len(residual) if singular else ROWS):
        right = (residual[rows[:, None], kept] / scale).to(gram.dtype)
        if factor is None:
            solved = gram.solve_singular(gram.block(kept), right)
        else:
            solved = torch.cholesky_solve(right.T, factor).T
        step[rows[:, None], kept] = (-solved / scale).to(dtype)
    return step, singular


def _row_steps(
    gram: ScaledGram, gradient: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]
) -> tuple[Float[Tensor, "out in"], bool]:
    """Return the step for a mask per row: systems in batches of rows, padded to the largest count by the identity."""
    step = torch.zeros_like(gradient)
    most = int(mask.sum(1).max())
    if most == 0:
        return step, False
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :most]
    batch = max(1, BATCH_BYTES // (most * most * gradient.element_size()))
    any_singular = False
    for rows in torch.split(torch.arange(mask.shape[0], device=mask.device), batch):
        index = order[rows]
        real = mask[rows].gather(1, index)
        block = gram.matrix[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
        block.diagonal(dim1=1, dim2=2).add_(~real)
        right = gradient[rows].gather(1, index) * real
        factor, regular = gram.factorised(block)
        solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        singular = ~regular
        if bool(singular.any()):
            solved[singular] = gram.solve_singular(block[singular], right[singular][:, None])[:, 0]
            any_singular = True
        step[rows] = step[rows].scatter(1, index, -solved * real)
    return step, any_singular
