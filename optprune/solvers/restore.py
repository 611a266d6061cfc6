"""Restoration in closed form: the best weights on a fixed mask, with its certificate from the normal equations."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import NumericalError
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem, SelectionProblem
from optprune.solvers.base import Answer, DirectSolver
from optprune.solvers.solution import Certificate

SINGULAR = (
    "singular Gram matrix on the kept inputs: the solution nearest the original weights was taken (pseudo-inverse)"
)
COUPLED = (
    "it solves row by row, and the full output metric couples rows whose masks differ: take ConjugateGradients, or the "
    "diagonal of the metric"
)
BATCH_BYTES = 1 << 28
"""how much memory one batch of rows may take when every row has a mask of its own"""
INDEFINITE = 1e-5
"""a negative eigenvalue above this share of the largest is no rounding of a float32 Gram matrix"""


@final
@dataclass(frozen=True)
class Restore(DirectSolver):
    r"""Solve the normal equations on the mask, as a change Z of the masked weight U = W * mask:

        (G_U + Z A)_M = 0,   G_U = (U - W) A + (W A - B),   Z_M = -(G_U)_M (A_MM)^-1,   Z = 0 outside M.

    Accepts restoration problems, and selection problems, where it refits on the support of the start. One Cholesky
    factor serves all rows that share a mask; other rows are factorised in batches. Where A_MM is singular (fewer
    tokens than inputs and no damping) the minimiser nearest U is taken by an eigendecomposition, and that is noted.

    A full output metric changes nothing where all rows share the mask, S being a factor of the normal equations, and
    couples the rows otherwise; such problems are refused.

    Promises the optimum of a restoration problem, and a certificate: with r the residual of the normal equations at
    the answer, f(V) - min f <= 1/2 tr(r (A_MM)^-1 r^T) <= 1/2 sum_ij r_ij^2 / D_j.
    Cost: in^3 / 3 + 2 out in^2, or out in^3 / 3 with a mask for every row (`choose` then prefers gradients); memory
    in^2 in `factor_dtype`, whatever the dtype of the problem.
    Reference: FASP (arXiv 2501.09412), restoration; the ridge towards W instead of zero is ours.
    """

    factor_dtype: torch.dtype = torch.float64

    def why_not(self, problem: Problem) -> str | None:
        if isinstance(problem, MaskedLeastSquares | SelectionProblem):
            return COUPLED if problem.loss.coupled and _mask(problem, problem.loss.weight).shape[0] > 1 else None
        return f"it needs a fixed mask or a support, and a {problem.kind} problem has neither"

    def exact(self, problem: Problem) -> bool:
        return isinstance(problem, MaskedLeastSquares)

    def monotone(self, problem: Problem) -> bool:
        return True

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        if isinstance(problem, MaskedLeastSquares):
            return self._restore(problem)
        assert isinstance(problem, SelectionProblem)
        # A bound would hold for this choice only, not for the best choice.
        return self._restore(problem.restrict(problem.support(start)), certify=False)

    def _restore(self, problem: MaskedLeastSquares, certify: bool = True) -> Answer:
        loss, mask = problem.loss, problem.mask
        value = problem.start()
        gram = loss.gram.to(self.factor_dtype)
        change, singular = _newton_step(gram, loss.residual(value).to(gram), mask, _rounding(loss), _noise(loss))
        value = value + change.to(value)
        certificate = _certificate(problem, gram, value) if certify else None
        return Answer(value, certificate, (SINGULAR,) if singular else ())


def _mask(problem: MaskedLeastSquares | SelectionProblem, start: Tensor) -> Bool[Tensor, "rows in"]:
    if isinstance(problem, MaskedLeastSquares):
        return problem.mask
    return problem.mask(problem.support(start))


def _certificate(problem: MaskedLeastSquares, gram: Float[Tensor, "in in"], value: Tensor) -> Certificate:
    """The lower bound f(V) - 1/2 tr(r A_MM^-1 r^T), or with D for A_MM where every input is damped."""
    loss, mask = problem.loss, problem.mask
    residual = torch.where(mask, loss.exact_residual(value), 0.0)
    # Where a metric couples the rows they share the mask, so S is a factor here too.
    weighed = loss.weigh(residual)
    if bool((loss.damping > 0).all()):
        excess = float((residual * weighed / loss.damping.double()).sum()) / 2
    else:
        step, _ = _newton_step(gram, residual.to(gram), mask, _rounding(loss), _noise(loss))
        excess = -float((weighed * step).sum()) / 2
    # No loss is negative, so zero is a lower bound too.
    return Certificate(max(loss.value(value) - max(excess, 0.0), 0.0), "residual of the normal equations")


def _rounding(loss: LayerLoss) -> float:
    """The relative size below which a pivot or an eigenvalue of A may be rounding, for a Gram in its own dtype."""
    if bool((loss.damping > 0).all()):
        return torch.finfo(torch.float64).eps
    return loss.gram.shape[0] * torch.finfo(loss.gram.dtype).eps


def _noise(loss: LayerLoss) -> float:
    """The relative size below which an eigenvalue is noise once a block proved singular.

    Damping that lets a block be singular is no larger than the rounding of the Gram matrix in its own dtype, so the
    eigenvalues that it lifts are still noise, and inverting them would blow the weights up.
    """
    return max(_rounding(loss), 2 * torch.finfo(loss.gram.dtype).eps)


def _newton_step(
    gram: Float[Tensor, "in in"],
    gradient: Float[Tensor, "out in"],
    mask: Bool[Tensor, "rows in"],
    rounding: float,
    noise: float,
) -> tuple[Float[Tensor, "out in"], bool]:
    """-(G_M A_MM^-1) on the mask and zero elsewhere; and whether some A_MM was singular."""
    if mask.shape[0] == 1:
        return _shared_step(gram, gradient, mask[0], rounding, noise)
    return _row_steps(gram, gradient, mask, rounding, noise)


def _shared_step(
    gram: Float[Tensor, "in in"],
    gradient: Float[Tensor, "out in"],
    mask: Bool[Tensor, " in"],
    rounding: float,
    noise: float,
) -> tuple[Float[Tensor, "out in"], bool]:
    step = torch.zeros_like(gradient)
    kept = mask.nonzero()[:, 0]
    if kept.numel() == 0:
        return step, False
    block, right = gram[kept[:, None], kept], gradient[:, kept]
    factor, failed = torch.linalg.cholesky_ex(block)
    singular = bool(failed) or bool(_only_rounding(factor, block, rounding))
    step[:, kept] = -(right @ pseudo_inverse(block, noise) if singular else torch.cholesky_solve(right.T, factor).T)
    return step, singular


def _row_steps(
    gram: Float[Tensor, "in in"],
    gradient: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    rounding: float,
    noise: float,
) -> tuple[Float[Tensor, "out in"], bool]:
    """A mask per row: systems in batches of rows, each padded to the largest count by a multiple of the identity."""
    step = torch.zeros_like(gradient)
    most = int(mask.sum(1).max())
    if most == 0:
        return step, False
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :most]
    batch = max(1, BATCH_BYTES // (most * most * gram.element_size()))
    any_singular = False
    for rows in torch.arange(mask.shape[0], device=mask.device).split(batch):
        index = order[rows]
        real = mask[rows].gather(1, index)
        block = gram[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
        # In the size of the row's own block: an identity would make every block of small inputs look singular.
        size = block.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        block = block + torch.diag_embed(torch.where(real, 0.0, torch.where(size > 0, size, 1.0)))
        right = gradient[rows].gather(1, index) * real
        factor, failed = torch.linalg.cholesky_ex(block)
        solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        singular = (failed > 0) | _only_rounding(factor, block, rounding)
        for row in singular.nonzero()[:, 0].tolist():
            solved[row] = right[row] @ pseudo_inverse(block[row], noise)
        any_singular |= bool(singular.any())
        step[rows] = step[rows].scatter(1, index, -solved * real)
    return step, any_singular


def _only_rounding(
    factor: Float[Tensor, "*b n n"], block: Float[Tensor, "*b n n"], rounding: float
) -> Bool[Tensor, "*b"]:
    """Whether a Cholesky factor has a pivot that could be nothing but rounding."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    scale = block.diagonal(dim1=-2, dim2=-1).amax(-1)
    return ~(pivots.amin(-1) > scale * rounding)


def pseudo_inverse(matrix: Float[Tensor, "n n"], rounding: float) -> Float[Tensor, "n n"]:
    """The Moore-Penrose inverse of a positive semidefinite matrix; NumericalError if it is clearly indefinite."""
    values, vectors = torch.linalg.eigh(matrix)
    largest = values.abs().max()
    if bool(values[0] < -INDEFINITE * largest):
        raise NumericalError(
            f"the Gram matrix is indefinite: its least eigenvalue is {values[0].item():.3g} and its largest "
            f"{largest.item():.3g}; collect it again, or raise the damping above that"
        )
    usable = values > largest * rounding
    inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T
