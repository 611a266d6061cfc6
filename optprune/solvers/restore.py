"""Restoration in closed form: the best weights on a fixed mask, with its certificate from the normal equations."""

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem, SelectionProblem
from optprune.solvers.base import Answer, DirectSolver
from optprune.solvers.solution import Certificate
from optprune.solvers.spectrum import ScaledGram
from optprune.solvers.workspace import Workspace

SINGULAR = (
    "singular Gram matrix on the kept inputs: the solution nearest the original weights, each measured by the size of "
    "its input, was taken (pseudo-inverse)"
)
COUPLED = (
    "it solves row by row, and the full output metric couples rows whose masks differ: take ConjugateGradients, or the "
    "diagonal of the metric"
)
Restorable: TypeAlias = MaskedLeastSquares | SelectionProblem
"""a problem with a mask, or with a choice that a start makes"""
BATCH_BYTES = 1 << 28
"""how much memory one batch of rows may take when every row has a mask of its own"""
ROWS = 512
"""how many rows that share a mask are solved for at a time"""


@dataclass(frozen=True, eq=False)
class Restored(Answer):
    """What was restored, or a start that is better, and what a certificate is taken from."""

    restored: Tensor = field(kw_only=True)
    """the solution of the normal equations"""


@final
@dataclass(frozen=True)
class Restore(DirectSolver[Restorable]):
    r"""Solve the normal equations on the mask, as a change Z of the masked weight U = W * mask:

        (G_U + Z A)_M = 0,   G_U = (U - W) A + (W A - B),   Z_M = -(G_U)_M (A_MM)^-1,   Z = 0 outside M.

    Accepts restoration problems, and selection problems, where it refits on the support of the start. One Cholesky
    factor serves all rows that share a mask; other rows are factorised in batches. All in units in which A has a unit
    diagonal, s_j^2 = E[x*_j^2] + D_j: a small input is not taken for rounding of a large one. Where A_MM is singular
    in them (fewer tokens than inputs and no damping), the minimiser with the least sum_j s_j^2 Z_ij^2 in every row,
    which depends on no unit, is taken by an eigendecomposition, and that is noted; dead inputs stay as they are. A
    start that is better still, by what rounding hides of A, is returned as it came.

    A full output metric changes nothing where all rows share the mask, S being a factor of the normal equations, and
    couples the rows otherwise; such problems are refused.

    Promises the optimum of a restoration problem, by factors in float64; float32 ones promise nothing. Certifies it:
    with r the residual of the normal equations at the answer, f(V) - min f <= 1/2 tr(r (A_MM)^-1 r^T) <= 1/2 sum_ij
    r_ij^2 / D_j. Where A_MM is singular, what r has outside its range must be rounding; otherwise the bound is zero.
    Cost: 2 in^3 / 3 + 2 out in^2, one third of in^3 of it to know that A_MM is regular; with a mask for every row out
    in^3 / 3, or twice that where A itself is singular (`choose` then prefers gradients). Memory 2 in^2 in
    `factor_dtype`, whatever the dtype of the problem.
    Reference: FASP (arXiv 2501.09412), restoration; the ridge towards W instead of zero is ours.
    """

    accepts = (MaskedLeastSquares, SelectionProblem)
    workspace = Workspace(15.2, 34.7, 1.2)
    coupled_workspace = Workspace(16.9, 55.5, 25.0)

    factor_dtype: torch.dtype = torch.float64

    def why_not(self, problem: Restorable) -> str | None:
        coupled = problem.loss.coupled and fixed_mask(problem, problem.loss.weight).shape[0] > 1
        return COUPLED if coupled else None

    def exact(self, problem: Restorable) -> bool:
        return isinstance(problem, MaskedLeastSquares) and self.factor_dtype == torch.float64

    def monotone(self, problem: Restorable) -> bool:
        return self.factor_dtype == torch.float64

    def answer(self, problem: Restorable, start: Tensor) -> Restored:
        masked = isinstance(problem, MaskedLeastSquares)
        found = self._restore(problem if masked else problem.restrict(problem.support(start)))
        if found.notes and _is_better(problem, start, found.value):
            return replace(found, value=start.clone())
        return found

    def certify(self, problem: Restorable, state: Answer) -> Certificate | None:
        # Of a choice a bound would hold for this one only, not for the best.
        if not isinstance(problem, MaskedLeastSquares) or not isinstance(state, Restored):
            return None
        return _certificate(problem, ScaledGram.of(problem.loss, self.factor_dtype), state.restored)

    def _restore(self, problem: MaskedLeastSquares) -> Restored:
        value, gram = problem.start(), ScaledGram.of(problem.loss, self.factor_dtype)
        change, singular = _newton_step(gram, problem.loss.residual(value), problem.mask, value.dtype)
        value = change.add_(value)
        return Restored(value, notes=(SINGULAR,) if singular else (), restored=value)


def _is_better(problem: Problem, start: Tensor, found: Tensor) -> bool:
    """Whether a feasible start is better by more than rounding: it then uses what the pseudo-inverse cuts off."""
    if problem.violation(start) > 0:
        return False
    return problem.objective(start) < problem.objective(found) - problem.loss.rounding(found)


def fixed_mask(problem: Restorable, start: Tensor) -> Bool[Tensor, "rows in"]:
    """The mask of a restoration problem, or of the choice that the start of a selection problem stands for."""
    if isinstance(problem, MaskedLeastSquares):
        return problem.mask
    return problem.mask(problem.support(start))


def _certificate(problem: MaskedLeastSquares, gram: ScaledGram, value: Tensor) -> Certificate:
    """The lower bound f(V) - 1/2 tr(r A_MM^-1 r^T), or with D for A_MM where every input is damped."""
    loss, mask = problem.loss, problem.mask
    residual = torch.where(mask, loss.exact_residual(value), 0.0)
    # Where a metric couples the rows they share the mask, so S is a factor here too.
    weighed = loss.weigh(residual)
    if bool((loss.damping > 0).all()):
        excess = float((residual * weighed / loss.damping.double()).sum()) / 2
    else:
        step, singular = _newton_step(gram, residual, mask, residual.dtype)
        left = torch.where(mask, residual + step @ loss.gram.double(), 0.0)
        unsolved = singular and not only_rounding(loss, value, left)
        excess = math.inf if unsolved else -float((weighed * step).sum()) / 2
    # No loss is negative, so zero is a lower bound too.
    return Certificate(max(loss.exact_value(value) - max(excess, 0.0), 0.0), "residual of the normal equations")


def only_rounding(loss: LayerLoss, weight: Float[Tensor, "out in"], residual: Float[Tensor, "out in"]) -> bool:
    """Whether a residual V A - B, or a part of it, may be nothing but rounding of the moments."""
    sizes = linalg.norm(residual / loss.input_scale, 1)
    return bool((sizes <= residual.shape[1] ** 0.5 * loss.residual_rounding(weight)).all())


def _newton_step(
    gram: ScaledGram, residual: Float[Tensor, "out in"], mask: Bool[Tensor, "rows in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "out in"], bool]:
    """-(G_M A_MM^-1) on the mask and zero elsewhere, rounded to a dtype; and whether some A_MM was singular."""
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
    # A few rows at a time: what they take in the factor's dtype is small.
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
    """A mask per row: systems in batches of rows, each padded to the largest count by the identity."""
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
