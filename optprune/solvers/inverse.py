"""The layer loss seen from its unconstrained minimum: what the methods around Optimal Brain Surgeon work with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.errors import NumericalError
from optprune.numerics import linalg
from optprune.problems import LayerLoss

SINGULAR = "singular Gram matrix: units were chosen with a ridge of {:.1e} of its mean diagonal added to it"

LARGEST = 1e-3
"""the largest ridge that is tried, as a share of the mean diagonal"""
COLUMNS = 1024
"""how many columns are squared at a time"""


@dataclass(frozen=True, eq=False)
class InverseForm:
    r"""f(V) = f(V0) + 1/2 tr((V - V0) A (V - V0)^T) with V0 = B A^-1, by A^-1 and V0 in float64.

    Removing the columns P and refitting the others gives V = V0 - V0_P (A^-1_PP)^-1 A^-1_P and costs
    1/2 tr(V0_P (A^-1_PP)^-1 V0_P^T). Where A is singular, or could be within its own rounding, a ridge towards the
    original weights of the size of that rounding is added to it, and `notes` says so. A damped A is taken as it is in
    float64, unless the damping is below what the moments are known to, and leaves it indefinite.

    Reference: Optimal Brain Surgeon (Hassibi and Stork, 1992).
    """

    inverse: Float[Tensor, "in in"]
    minimiser: Float[Tensor, "out in"]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, loss: LayerLoss) -> "InverseForm":
        size = loss.gram.diagonal().double().mean()
        # An eigenvalue of A is known to about this share of its size in the dtype that A was given in.
        rounding = 4 * len(loss.gram) * torch.finfo(loss.gram.dtype).eps
        known = 4 * len(loss.gram) * torch.finfo(torch.float64).eps if bool((loss.damping > 0).all()) else rounding
        gram = linalg.by_columns(loss.gram, torch.float64)
        gram.diagonal().sub_(float(known * size))
        singular = bool(linalg.cholesky_in_place(gram))
        # Anew in the same place: there is no more than one copy but what a factorisation takes.
        gram.copy_(loss.gram)
        notes = ()
        if singular:
            ridge = _ridge(loss, gram, float(size), rounding)
            # Nothing but zeros is as good as the identity.
            gram.diagonal().add_(ridge * size if bool(size > 0) else 1.0)
            notes = (SINGULAR.format(ridge),)
        if bool(linalg.cholesky_in_place(gram)):
            raise NumericalError("the Gram matrix is indefinite: collect it again, or raise the damping")
        inverse = torch.cholesky_inverse(gram, out=gram)
        weight = loss.weight.double()
        # The ridge pulls to the original weights, like damping, so V0 = W - (W A - B) A^-1 holds with it too.
        return cls(inverse, weight if loss.pull is None else weight - loss.pull.double() @ inverse, notes)

    def without(self, columns: Int[Tensor, " removed"]) -> Float[Tensor, "out in"]:
        """The best weight whose given columns are zero."""
        factor = linalg.cholesky(self.inverse[columns[:, None], columns])
        multiplier = torch.cholesky_solve(self.minimiser[:, columns].T, factor).T
        made_up = multiplier @ self.inverse[columns]
        weight = torch.sub(self.minimiser, made_up, out=made_up)
        # The update has left rounding where there is to be nothing.
        weight[:, columns] = 0
        return weight


def _ridge(loss: LayerLoss, gram: Float[Tensor, "in in"], size: float, least: float) -> float:
    """The first of `least`, 8 and 64 times that, ..., of the mean diagonal that makes A positive definite.

    The averages of many tokens in float32 may be off by more than a rounding of their entries.
    """
    ridge = least
    while size > 0 and ridge < LARGEST:
        gram.diagonal().add_(ridge * size)
        failed = bool(linalg.cholesky_in_place(gram))
        gram.copy_(loss.gram)
        if not failed:
            break
        ridge *= 8
    return ridge


def cost_rounding(loss: LayerLoss) -> float:
    """What the cost of a choice, a sum over inputs in float64, may be off by: a rounding of the constant for each."""
    return loss.constant * len(loss.damping) * torch.finfo(torch.float64).eps


def unit_blocks(
    matrix: Float[Tensor, "n n"], rows: Float[Tensor, "out n"], each: int
) -> tuple[Float[Tensor, "units each each"], Float[Tensor, "units each each"]]:
    """The diagonal blocks M_gg of a matrix and V_g^T V_g of some rows V, for units of `each` consecutive columns."""
    index = torch.arange(len(matrix), device=matrix.device).reshape(-1, each)
    if each == 1:
        squares = torch.cat([part.square().sum(0) for part in torch.split(rows, COLUMNS, 1)])
        return matrix.diagonal()[:, None, None].clone(), squares[:, None, None]
    parts = rows.T.reshape(-1, each, len(rows))
    return matrix[index[:, :, None], index[:, None, :]], parts @ parts.transpose(1, 2)


def half_trace(blocks: Float[Tensor, "*b k k"], grams: Float[Tensor, "*b k k"]) -> Float[Tensor, "*b"]:
    """1/2 tr(H^-1 G) for positive definite blocks H."""
    if blocks.shape[-1] == 1:
        return grams[..., 0, 0] / blocks[..., 0, 0] / 2
    # Rounding may have left a block that is not positive definite: its cost is as good as any.
    factor, _ = linalg.try_cholesky(blocks)
    return torch.cholesky_solve(grams, factor).diagonal(dim1=-2, dim2=-1).sum(-1) / 2
