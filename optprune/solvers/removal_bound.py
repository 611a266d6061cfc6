"""A lower bound for structured problems: the least cost of removing units, whatever other units are removed."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import OUTWARD, gamma
from optprune.numerics.tensors import all_finite
from optprune.problems import StructuredLeastSquares
from optprune.solvers.base import Answer, Certificate, DirectSolver, measuring, unfitted
from optprune.solvers.verified import VerifiedLoss
from optprune.work import DOUBLE, Work, eigenvectors, inverse, product

SHARPNESS = 1000.0
"""the decay of an eigenvector's weight in the supergradient: e^-1 for an eigenvalue smaller by a thousandth"""
LONGEST = 0.1
"""the largest change of a unit's log y in a step"""
SPARE = 1e-8
"""the share of the bound that is given up for the remaining gradient at V0"""


@final
@dataclass(frozen=True)
class RemovalBound(DirectSolver[StructuredLeastSquares]):
    r"""A lower bound on min f over the choices, from a relaxation; a feasible start is returned unchanged.

    Dropping the units P costs, by duality, the largest value over multipliers Y of

        sum_{g in P} <Y_g, V0_g> - 1/2 sum_{g, h in P} Q_gh,   Q_gh = sum_{c in g, d in h} (A^-1)_cd <Y_c, Y_d>,

    so one Y for all P gives a lower bound. Y_g = t_g V0_g (A^-1_gg)^-1 makes <Y_g, V0_g> = 2 t_g s_g and Q_gg = 2 t_g^2
    s_g with s_g the exact cost of dropping g alone. Where Q of t = 1 is at most diag(2 s_g lambda / y_g), t_g = y_g /
    lambda leaves

        min f >= f(V0) + 1 / lambda  min_P sum_{g in P} y_g s_g,

    and the inner minimum is a projection. y_g = min(1, s / s_g), with s the largest cost of the cheapest P, leaves that
    minimum unchanged, and lambda, the largest eigenvalue of Q scaled to the diagonal y, is then that of the units that
    may go: expensive units hardly count, however much they are coupled. From there a few supergradient steps in log y:
    up by a unit's share of the minimum, down by its share of the leading eigenvectors. Every y gives a bound, and the
    highest is taken. Columns of W that point in different directions make Q nearly diagonal even where inputs are
    correlated, so this bound is useful where a split of A is not. Where A cannot be told from a singular matrix it
    proves 0. Rounding errors of float64 are subtracted: A^-1 is replaced by a matrix K^T K that is proved to be no
    less, and lambda is proved by a Cholesky factor. Accepts structured problems. Cost: 3 in^3 + out in^2 +
    steps units^3, in float64.
    """

    steps: int = 4
    """the steps in log y"""

    accepts = (StructuredLeastSquares,)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        flops = measuring(outputs, inputs, coupled=coupled) + DOUBLE * (self.steps + 1) * eigenvectors(inputs)
        flops += 5 * inverse(inputs) + 25 * product(outputs, inputs, inputs)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def monotone(self, problem: StructuredLeastSquares) -> bool:
        return True

    def answer(self, problem: StructuredLeastSquares, start: Tensor) -> Answer:
        return Answer(problem.within_support(start))

    def prove(self, problem: StructuredLeastSquares, value: Tensor) -> Certificate | None:
        bound = _bound(problem, self.steps)
        return Certificate(bound if 0 < bound < math.inf else 0.0, "dual of the removal of units, one multiplier each")


def _bound(problem: StructuredLeastSquares, steps: int) -> float:
    verified, channels = VerifiedLoss.of(problem.loss), problem.channels
    inverse = _inverse_root(verified)
    if inverse is None or not _nonnegative(verified):
        return 0.0
    root, known = inverse
    change = _minimiser(verified, root)
    (units, each), flat = channels.columns.shape, channels.columns.reshape(-1)
    size = verified.inputs.size
    # V0 and the inverse in units in which A has a unit diagonal; the weight of a dead input has no cost.
    weight = torch.where(size > 0, (verified.weight + change) * size, 0.0)[:, flat]
    root = root[:, flat]
    inverse = root.T @ root
    index = torch.arange(units * each, device=flat.device).reshape(units, each)
    blocks = inverse[index[:, :, None], index[:, None, :]]
    parts = linalg.solve(blocks, weight.T.reshape(units, each, -1)).reshape(units * each, -1)
    weighed, norms = _weighed(verified, parts)
    coupling = (inverse * (parts @ weighed.T)).reshape(units, each, units, each).sum((1, 3))
    # <Y_g, V0_g>: twice the cost of a unit alone, less its rounding error.
    products = (weighed * weight.T).reshape(units, -1)
    slope = products.sum(1) - gamma(verified.terms + 8) * _absolute(verified, parts, weight).reshape(units, each).sum(1)
    alone = slope.clamp(min=0) / 2
    scale = torch.where(alone > 0, 2 * alone, 1.0).rsqrt()
    # The error of each entry of the coupling, as the product of two numbers of its units.
    off = (linalg.norm(root, 0) * norms).reshape(units, each).sum(1) * scale
    if not all_finite(coupling):
        # Numbers beyond the range of float64: no proof.
        return 0.0
    share = _share(problem, alone, coupling * torch.outer(scale, scale), steps)
    largest = _largest(coupling * torch.outer(scale, scale), share, off, verified.terms + len(size) + each)
    left = _left(verified, change)
    spare = SPARE if left else 0.0
    rise = share * alone / (largest * known * (1 + spare))
    gone = torch.where(problem.pattern.project(rise), 0.0, rise)
    below = float(gone.sum()) * (1 - gamma(units + 16))
    return verified.value(change) + below - ((1 + 1 / spare) * left / 2 if left else 0.0)


def _inverse_root(verified: VerifiedLoss) -> tuple[Float[Tensor, "in in"], float] | None:
    """Return K, k with k K^T K >= the inverse of A scaled to a unit diagonal; None where A may be singular.

    The Cholesky factor of A less its margin is one of a matrix L L^T that A exceeds, and |L^-1 y| <= |K y| / (1 - t)
    where K is nearly the inverse of L and |I - K L| <= t.
    """
    known = verified.inputs
    factor = known.scaled.clone()
    factor.diagonal().sub_(known.margin)
    if not known.margin < 1 or bool(linalg.cholesky_in_place(factor)):
        return None
    factor.tril_()
    count = len(factor)
    identity = torch.eye(count, dtype=factor.dtype, device=factor.device)
    root = linalg.solve_lower(factor, identity).tril_()
    sizes = float(linalg.norm(root)) * float(linalg.norm(factor))
    apart = float(linalg.norm(identity.addmm_(root, factor, alpha=-1))) + gamma(count + 2) * sizes
    return (root, 1 / (1 - OUTWARD * apart) ** 2) if apart < 0.5 else None


def _nonnegative(verified: VerifiedLoss) -> bool:
    """Return whether S is proved to be positive semidefinite."""
    return verified.outputs is None or verified.outputs.exceeds(0.0)


def _minimiser(verified: VerifiedLoss, root: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    """Return V0 - W."""
    pull, unit = verified.loss.exact.pull, verified.inputs.unit
    if pull is None:
        return torch.zeros_like(verified.weight)
    change = torch.zeros_like(pull)
    # The root is that of a matrix less a margin; a second step corrects its error.
    for _ in range(2):
        residual, _ = verified.residual(change)
        change = change - ((residual / unit) @ root.T @ root) / unit
    return change


def _weighed(verified: VerifiedLoss, parts: Float[Tensor, "in out"]) -> tuple[Tensor, Tensor]:
    """Return Y S, and sizes h_c: |<Y_c, S Y_d>| and its rounding error over the unit are at most h_c h_d."""
    if verified.outputs is None:
        return parts * verified.rows, linalg.norm(parts * verified.rows.sqrt(), 1)
    outputs = verified.outputs
    return parts @ outputs.matrix, outputs.ratio**0.5 * (parts.abs() @ outputs.size)


def _absolute(verified: VerifiedLoss, parts: Float[Tensor, "in out"], weight: Float[Tensor, "out in"]) -> Tensor:
    """Return <|Y_c|, |S| |V0_c|> for every column."""
    if verified.outputs is None:
        return (parts.abs() * verified.rows * weight.abs().T).sum(1)
    outputs = verified.outputs
    return outputs.ratio * (parts.abs() @ outputs.size) * weight.abs().T.mv(outputs.size)


def _left(verified: VerifiedLoss, change: Float[Tensor, "out in"]) -> float:
    """Return the most that the loss can fall below its value at V0, whose gradient is not exactly zero."""
    floor = verified.floor_of_columns
    if verified.loss.exact.pull is None:
        return 0.0
    if floor is None:
        return math.inf
    residual, error = verified.residual(change)
    most = residual.abs() + torch.outer(error, verified.inputs.size)
    rows = linalg.norm(torch.where(most == 0, 0.0, most / floor.sqrt()), 1)
    if verified.outputs is None:
        return OUTWARD * float((verified.rows * rows.square()).sum())
    return OUTWARD * verified.outputs.ratio * float((verified.outputs.size * rows).sum()) ** 2


def _largest(coupling: Tensor, share: Tensor, off: Tensor, terms: int) -> float:
    """Return a proved upper bound of the largest eigenvalue of a coupling scaled by the roots of y, or infinity."""
    root = share.sqrt()
    scaled, count = coupling * torch.outer(root, root), len(share)
    error = 2 * gamma(terms) * float((off * root).square().sum())
    largest = float(linalg.eigvalsh(scaled)[-1])
    for extra in (1e-12, 1e-9, 1e-6, 1e-3):
        bound = largest * (1 + extra) + 2 * error
        margin = error + gamma(count + 3) * 2 * count * (bound + 1)
        shifted = -scaled
        shifted.diagonal().add_(bound)
        if bound > 0 and not bool(linalg.cholesky_in_place(shifted)):
            return bound + margin
    return math.inf


def _share(problem: StructuredLeastSquares, alone: Tensor, coupling: Tensor, steps: int) -> Float[Tensor, " units"]:
    """Return the y with the highest sum over the cheapest P of y_g s_g / lambda, of those that are tried.

    `alone` [units] is s, and `coupling` [units, units] is Q of t = 1, scaled by 1 / sqrt(2 s_g 2 s_h).
    """
    # The device is read once, at the end.
    slots = problem.channels.by_slot
    dearest = torch.where(problem.pattern.project(alone), 0.0, alone).amax()
    share = torch.where(alone > 0, torch.minimum(alone, dearest) / alone, 1.0)
    least = torch.finfo(torch.float64).tiny
    best, kept = torch.zeros_like(dearest), share
    for step in range(steps + 1):
        root, value = share.sqrt(), share * alone
        sizes, vectors = linalg.eigh(coupling * torch.outer(root, root))
        largest = sizes[-1].clamp(min=least)
        # Equal costs differ by roundings, which must not decide which of them goes.
        level = (value / value.amax().clamp(min=least)).float()
        gone = torch.where(problem.pattern.project(level), 0.0, value)
        total = gone.sum()
        better = total / largest > best
        best, kept = torch.where(better, total / largest, best), torch.where(better, share, kept)
        if step < steps:
            leading = vectors.square() @ (SHARPNESS * (sizes / largest - 1)).exp()
            slope = _shared(gone, level, slots) / total.clamp(min=least) - leading / leading.sum().clamp(min=least)
            share = share * (LONGEST * slope / slope.abs().amax().clamp(min=least)).exp()
    return kept


def _shared(
    gone: Float[Tensor, " units"], level: Float[Tensor, " units"], slots: Int[Tensor, "slots size"]
) -> Float[Tensor, " units"]:
    """Return the costs of the units that go, where in each slot those of the same level as the dearest share theirs.

    Which of them go is arbitrary, so every choice gives a supergradient of the least sum, and so does their average.
    """
    costs, levels = gone[slots], level[slots]
    edge = levels.where(costs > 0, 0.0).amax(1, keepdim=True)
    tied = (levels == edge) & (edge > 0)
    average = (costs * tied).sum(1, keepdim=True) / tied.sum(1, keepdim=True).clamp(min=1)
    return gone.scatter(0, slots.reshape(-1), torch.where(tied, average, costs).reshape(-1))
