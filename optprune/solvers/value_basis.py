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

import math
from itertools import product

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
MOST_TURNING = 1e7
"""the most multiplications of one sweep of turns, about a tenth of a second"""
ANGLES = 32
"""the angles of a half turn that are tried first, and then around the best one"""
ZOOMS = 6
"""the times that the angles around the best one are tried, each closer by ANGLES / 4"""
DEPENDENT = torch.finfo(torch.float64).eps ** (2 / 3)
"""the share of the largest diagonal entry of A up to which an eigenvalue counts as zero"""
SWEEPS = 30
"""the most sweeps of turns"""


@full_precision()
def nested_basis(loss: LayerLoss, channels: Channels) -> Rotation:
    """Return directions by falling importance in every slot; a subset keeps the first r."""
    return Rotation.of(_leading(_SlotProblem(loss, channels)).to(loss.weight.dtype), channels)


@full_precision()
def best_basis(loss: LayerLoss, channels: Channels, keep: int) -> Rotation:
    """Return a basis whose first `keep` directions in every slot lose no more than those of `nested_basis`.

    `keep` counts per slot. A round costs a Cholesky factor of the directions of all slots, and `STEPS` products with A.
    Where the slots are small, every kept direction is then turned towards every other one of its slot, by the best of
    all angles, until nothing gains: alternation is slow where inputs are nearly dependent, and ends at other directions
    than the best.
    """
    problem = _SlotProblem(loss, channels)
    basis = _leading(problem)
    directions = basis[..., :keep]
    for _ in range(ROUNDS):
        directions = linalg.orthonormal(problem.alternate(directions))
    whole = linalg.orthonormal(directions, whole=True)
    if 0 < keep < problem.size and problem.turning(keep) <= MOST_TURNING:
        whole = _turned(problem, whole, keep)
    return Rotation.of(whole.to(loss.weight.dtype), channels)


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

    def turning(self, keep: int) -> float:
        """Return the multiplications of a sweep of turns."""
        pairs, width = self.slots * keep * (self.size - keep), len(self.gram)
        return pairs * (ZOOMS + 1) * ANGLES * (width * width + (self.slots * self.tied * keep) ** 3)

    def gains(self, directions: Float[Tensor, "trials slots size r"]) -> Float[Tensor, " trials"]:
        """Return by how much the best Z for each of some directions lowers the loss of V = 0."""
        heads, each = self.slots * self.tied, directions.repeat_interleave(self.tied, 1)
        blocks = self.gram.reshape(heads, self.size, heads, self.size)
        gram = torch.einsum("thik,hirj,trjl->thkrl", each, blocks, each).flatten(1, 2).flatten(2)
        right = torch.einsum("ohi,thik->tohk", self.target.reshape(-1, heads, self.size), each).flatten(2)
        values, vectors = linalg.eigh((gram + gram.mT) / 2)
        # Directions almost without inputs count nothing: their weights would be huge.
        seen = values > DEPENDENT * self.gram.diagonal().max()
        squares = (right @ vectors).square().sum(1)
        return torch.where(seen, squares / torch.where(seen, values, 1.0), 0.0).sum(1) / 2

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


def _turned(problem: _SlotProblem, basis: Float[Tensor, "slots size size"], keep: int) -> Tensor:
    """Return a basis after turns of single pairs of directions, one kept and one not, that each lower the loss most."""
    least = torch.finfo(basis.dtype).eps * float(problem.gains(basis[None])[0]) * len(problem.gram)
    gain = float(problem.gains(basis[None, ..., :keep])[0])
    for _ in range(SWEEPS):
        before = gain
        for slot, kept, other in product(range(problem.slots), range(keep), range(keep, problem.size)):
            basis, gain = _best_turn(problem, basis, keep, (slot, kept, other), gain + least)
        if gain - before <= least:
            break
    return basis


def _best_turn(
    problem: _SlotProblem, basis: Float[Tensor, "slots size size"], keep: int, pair: tuple[int, int, int], least: float
) -> tuple[Float[Tensor, "slots size size"], float]:
    """Return the basis with a kept direction of a slot turned towards another, where it gains more than before."""
    slot, kept, other = pair
    one, two = basis[slot, :, kept], basis[slot, :, other]
    middle, span, best = basis.new_zeros(()), math.pi, basis.new_zeros(())
    gain = basis.new_full((), -math.inf)
    steps = torch.arange(ANGLES, dtype=basis.dtype, device=basis.device) / ANGLES - 0.5
    for _ in range(ZOOMS + 1):
        angles = middle + span * steps
        trials = basis[None, ..., :keep].repeat(ANGLES, 1, 1, 1)
        trials[:, slot, :, kept] = torch.outer(angles.cos(), one) + torch.outer(angles.sin(), two)
        gains = problem.gains(trials)
        place = gains.argmax()
        best = torch.where(gains[place] > gain, angles[place], best)
        gain = torch.maximum(gain, gains[place])
        middle, span = best, span * 4 / ANGLES
    if not float(gain) > least:
        return basis, least
    turned = basis.clone()
    turned[slot, :, kept] = best.cos() * one + best.sin() * two
    turned[slot, :, other] = best.cos() * two - best.sin() * one
    return turned, float(gain)


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
