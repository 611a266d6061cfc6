"""The basis in which value dimensions are removed: the directions whose loss is least, in place of coordinates.

With r directions W [size, r] per slot the weight is V = Z W^T, one W for all columns tied to the slot (the query
heads that read a KV head). The best r directions solve the least squares problem over weights whose part in
every slot has rank r:

    minimise  1/2 tr(V A V^T) - tr(V B^T)   over  V_h = Z_h W_s^T  for each head h of the slot s.

With one head, and no correlation between slots, W spans the r leading generalised eigenvectors of (B^T B, A), by Eckart
and Young in the norm of A: exact, and nested for all r. With several heads their sums are used, and from there
alternating least squares starts; it never raises the loss.

Reference: ours; for one head the activation-aware low-rank factorisation of V and O (Yuan et al., ASVD, 2023; Wang et
al., SVD-LLM, 2024).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.precision import full_precision
from optprune.problems import Channels, LayerLoss, Rotation
from optprune.work import DOUBLE, Work, inverse, storage
from optprune.work import product as products

ROUNDS = 4
"""rounds of the alternation; on the layers of a real model four are within 2 percent of a hundred"""
STEPS = 8
"""conjugate gradient steps of a round"""
MOST_SEARCHED = 24
"""the most entries of the kept directions for which BFGS is tried, about three tenths of a second"""
STARTS = 8
"""the starts of BFGS, the first at the directions of the alternation and the others random"""
DEPENDENT = torch.finfo(torch.float64).eps ** (2 / 3)
"""the share of the largest diagonal entry of A up to which an eigenvalue counts as zero"""


@full_precision()
def nested_basis(loss: LayerLoss, channels: Channels) -> Rotation:
    """Return directions by falling importance in every slot; a subset keeps the first r."""
    return Rotation.of(_leading(_SlotProblem(loss, channels)).to(loss.weight.dtype), channels)


@full_precision()
def best_basis(loss: LayerLoss, channels: Channels, keep: int) -> Rotation:
    """Return a basis whose first `keep` directions in every slot lose no more than those of `nested_basis`.

    `keep` counts per slot. A round costs a Cholesky factor of the directions of all slots, and `STEPS` products with A.
    Where the slots are small, BFGS then searches for better ones from there and from random directions: alternation is
    slow where inputs are nearly dependent, and ends at a local optimum.
    """
    problem = _SlotProblem(loss, channels)
    basis = _leading(problem)
    directions = basis[..., :keep]
    for _ in range(ROUNDS):
        directions = linalg.orthonormal(problem.alternate(directions))
    if 0 < keep < problem.size and problem.slots * problem.size * keep <= MOST_SEARCHED:
        directions = _searched(problem, directions)
    return Rotation.of(linalg.orthonormal(directions, whole=True).to(loss.weight.dtype), channels)


def best_basis_work(outputs: int, inputs: int) -> Work:
    """Return the work of `best_basis`, for a weight [outputs, inputs]: A and B in float64, and parts of them."""
    turn = (STEPS + 2) * DOUBLE * products(outputs, inputs, inputs) + DOUBLE * products(inputs, inputs, inputs)
    return Work(ROUNDS * (turn + inverse(inputs)), storage(outputs, inputs, 32.0, 24.0))


class _SlotProblem:
    """The least squares problem in float64, its columns sorted by slot, then by tied column, then by unit."""

    def __init__(self, loss: LayerLoss, channels: Channels) -> None:
        plain = loss.whitened()
        columns = channels.columns[channels.by_slot]
        self.slots, self.size, self.tied = columns.shape
        order = columns.mT.reshape(-1)
        self.gram = plain.gram.double()[order[:, None], order]
        """A of the columns that belong to units"""
        self.target = plain.target.double()[:, order]
        """B of the same columns"""
        rest = torch.ones(len(plain.gram), dtype=torch.bool, device=order.device)
        rest[order] = False
        if bool(rest.any()):
            self._eliminate(plain, rest.nonzero()[:, 0], order)

    def _eliminate(self, plain: LayerLoss, rest: Tensor, order: Tensor) -> None:
        """Eliminate the columns of no unit, which stay and are fitted freely, by a Schur complement."""
        gram, target = plain.gram.double(), plain.target.double()
        across = gram[rest[:, None], order]
        solved = linalg.pinv(gram[rest[:, None], rest]) @ across
        self.gram = self.gram - across.T @ solved
        self.target = self.target - target[:, rest] @ solved

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return the sums over tied columns of B_h^T B_h and of A_hh, for every slot [slots, size, size]."""
        heads = self.slots * self.tied
        every = torch.arange(heads, device=self.gram.device)
        own = self.gram.reshape(heads, self.size, heads, self.size)[every, :, every]
        pulled = self.target.reshape(-1, heads, self.size)
        square = torch.einsum("ohi,ohj->hij", pulled, pulled)
        shape = self.slots, self.tied, self.size, self.size
        return square.reshape(shape).sum(1), own.reshape(shape).sum(1)

    def fitted(self, directions: Float[Tensor, "slots size r"]) -> Float[Tensor, "out heads r"]:
        """Return the best Z for given directions."""
        heads, kept = self.slots * self.tied, directions.shape[2]
        each = directions.repeat_interleave(self.tied, 0)
        # W^T A W and B W, with W block by block.
        half = torch.einsum("hirj,hik->hkrj", self.gram.reshape(heads, self.size, heads, self.size), each)
        gram = torch.einsum("hkrj,rjl->hkrl", half, each).reshape(heads * kept, heads * kept)
        right = torch.einsum("ohi,hik->ohk", self.target.reshape(-1, heads, self.size), each).flatten(1)
        gram = (gram + gram.T) / 2
        gram.diagonal().add_(torch.finfo(gram.dtype).eps * heads * kept * gram.diagonal().mean())
        factor, failed = linalg.try_cholesky(gram)
        # Linearly dependent inputs without damping: the minimiser of least norm.
        inverse = linalg.pinv(gram) if bool(failed) else torch.cholesky_inverse(factor)
        return (right @ inverse).reshape(-1, heads, kept)

    def gain(self, directions: Float[Tensor, "slots size r"]) -> tuple[Tensor, Float[Tensor, "slots size r"]]:
        """Return by how much the best Z lowers the loss of V = 0, and the gradient of that; only spans matter.

        By the envelope theorem the gradient is that of the loss for the best Z. Directions almost without inputs count
        nothing: their weights would be huge.
        """
        basis, factor = linalg.qr(directions)
        heads, kept = self.slots * self.tied, directions.shape[2]
        each = basis.repeat_interleave(self.tied, 0)
        spread = linalg.block_diagonal(each)
        gram, right = spread.T @ self.gram @ spread, self.target @ spread
        values, vectors = linalg.eigh((gram + gram.T) / 2)
        seen = values > DEPENDENT * self.gram.diagonal().max()
        fitted = right @ vectors * torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0) @ vectors.T
        residual = (self.target - fitted @ spread.T @ self.gram).reshape(-1, heads, self.size)
        slope = torch.einsum("ohi,ohk->hik", residual, fitted.reshape(-1, heads, kept))
        slope = slope.reshape(self.slots, self.tied, self.size, kept).sum(1)
        return (right * fitted).sum() / 2, linalg.solve_upper(factor, slope.mT).mT

    def alternate(self, directions: Float[Tensor, "slots size r"]) -> Float[Tensor, "slots size r"]:
        """Return the directions after one round: fit Z, then conjugate gradients on W for that Z."""
        fitted = self.fitted(directions)

        def weight(change: Tensor) -> Tensor:
            return torch.einsum("ohk,hik->ohi", fitted, change.repeat_interleave(self.tied, 0)).flatten(1)

        def gradient(residual: Tensor) -> Tensor:
            each = torch.einsum("ohi,ohk->hik", residual.reshape(len(residual), -1, self.size), fitted)
            return each.reshape(self.slots, self.tied, *each.shape[1:]).sum(1)

        at = directions
        residual = -gradient(weight(at) @ self.gram - self.target)
        direction, energy = residual, residual.square().sum()
        for _ in range(STEPS):
            product = gradient(weight(direction) @ self.gram)
            curvature = (direction * product).sum()
            length = torch.where(curvature > 0, energy / curvature, 0.0)
            at, residual = at + length * direction, residual - length * product
            fresh = residual.square().sum()
            direction = residual + torch.where(energy > 0, fresh / energy, 0.0) * direction
            energy = fresh
        return at


def _searched(problem: _SlotProblem, directions: Float[Tensor, "slots size r"]) -> Float[Tensor, "slots size r"]:
    """Return the directions that gain most of the given ones and of those where a descent ends, from several starts."""
    shape, scale = directions.shape, float(problem.gain(directions)[0]) or 1.0
    generator = torch.Generator().manual_seed(0)

    def lost(at: Tensor) -> tuple[Tensor, Tensor]:
        gain, gradient = problem.gain(at)
        return -gain / scale, -gradient / scale

    best, gain = directions, problem.gain(directions)[0]
    for start in range(STARTS):
        begun = directions if start == 0 else torch.randn(shape, generator=generator, dtype=torch.float64)
        ended = linalg.orthonormal(linalg.descended(lost, begun.to(directions)))
        reached = problem.gain(ended)[0]
        best, gain = torch.where(reached > gain, ended, best), torch.maximum(gain, reached)
    return best


def _leading(problem: _SlotProblem) -> Float[Tensor, "slots size size"]:
    """Return generalised eigenvectors of (sum B_h^T B_h, sum A_hh), the largest first, orthogonalised in that order.

    Directions without inputs come last.
    """
    square, gram = problem.blocks()
    sizes, vectors = linalg.eigh(gram)
    least = torch.finfo(gram.dtype).eps * problem.size * sizes[:, -1:].clamp(min=0)
    seen = sizes > least
    scaled = vectors * torch.where(seen, sizes, 1.0).rsqrt()[:, None, :] * seen[:, None, :]
    _, mixed = linalg.eigh(scaled.mT @ square @ scaled)
    ordered = (scaled @ mixed).flip(-1)
    norms = linalg.norm(ordered, 1)[:, None]
    # Only their order counts. Vectors of no length are directions without inputs, which the QR completes.
    return linalg.orthonormal(ordered / torch.where(norms > 0, norms, 1.0))
