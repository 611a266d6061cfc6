"""A lower bound for choices of weights, by the dual of the perspective relaxation with an optimised diagonal."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.rounding import OUTWARD, UNIT, KnownMatrix, gamma
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import LayerLoss, SelectionProblem, SparseLeastSquares
from optprune.solvers.base import Answer, Certificate, DirectSolver, check_options, measuring, unfitted
from optprune.solvers.spectrum import column_steps, largest_eigenvalue_bound
from optprune.solvers.verified import VerifiedLoss
from optprune.work import DOUBLE, Work, inverse, product, sweeps

EVERY = 10
"""steps between two measurements of the bound"""
ENOUGH, PATIENCE, LEAST = 1e-3, 3, 100
"""the relative rise of the bound that counts, the measurements that may miss it, and the steps before which they may:
near V = W the bound of the first points is below that of W itself"""
HALVINGS = 25
"""the halvings of the interval in the search for the price of keeping a weight"""


@final
@dataclass(frozen=True)
class PerspectiveBound(DirectSolver[SelectionProblem]):
    r"""A lower bound on min f over the choices, from a relaxation; a feasible start is returned unchanged.

    Split S (x) A = R + diag(d), R positive semidefinite. f is the R part, convex, and a part for every weight alone;
    with the R part replaced by its tangent at any W + Y each weight has its own best value, kept or removed, so that
    the exact projection of the problem gives the least over all its masks and all weights:

        e/2 - 1/2 <Y, R Y> - sum_ij G_ij^2 / (2 d_ij) + min_P sum_{ij in P} d_ij (W_ij - G_ij / d_ij)^2 / 2,

    G = R Y + S (W A - B). That is the dual of the perspective relaxation (Frangioni and Gentile, 2006). The diagonal
    nearly maximises sum_j d_j |W_j| s_j, the root mean squares of columns times the sizes of their inputs (`split_off`;
    under a full metric d_ij = a_i d_j with a diagonal for S too). Y comes from `most` accelerated proximal steps on the
    relaxation, min over V and z in [0, 1], sum z <= keep in every group, of the R part and 1/2 sum d V^2 / z; of other
    choices than counts of single weights z is the best mask of the point. Rounding errors of float64 are subtracted.

    It is zero where A is singular, and smaller the smaller the damping is: d is no more than the variance of an input
    given all others. On layers of SmolLM2 damped by 1 percent it is 0.65 of the best known objective at
    50 percent and 0.61 at 2:4, in the median (`benchmarks/sparse_bounds.py`).

    Accepts every selection problem; where whole columns go `RemovalBound` proves more. Cost: 60 in^3 for the diagonal,
    and two products [out, in] x [in, in] a step, in float64.
    """

    accepts = (SelectionProblem,)

    most: int = 200

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        step = 2 * DOUBLE * product(outputs, inputs, inputs) + sweeps(115, outputs, inputs)
        if coupled:
            step += 2 * DOUBLE * product(outputs, outputs, inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + 40 * inverse(inputs) + 40 * inverse(outputs) * coupled
        return Work(flops + self.most * step, unfitted(outputs, inputs, coupled=coupled))

    def monotone(self, problem: SelectionProblem) -> bool:
        return True

    def answer(self, problem: SelectionProblem, start: Tensor) -> Answer:
        return Answer(problem.within_support(start))

    def prove(self, problem: SelectionProblem, value: Tensor) -> Certificate | None:
        verified = VerifiedLoss.of(problem.loss)
        split = _split(verified)
        bound = _ascent(problem, verified, split, self.most) if bool((split > 0).any()) else 0.0
        return Certificate(bound if 0 < bound < math.inf else 0.0, "dual of the perspective relaxation")


def _split(verified: VerifiedLoss) -> Float[Tensor, "out in"]:
    """Return a d with S (x) A >= diag(d)."""
    size, weight = verified.inputs.size, verified.weight
    columns = (verified.rows[:, None] * weight.square()).mean(0).sqrt() * size
    # A column of zeros has a small weight, not zero.
    least = float(columns.mean()) * 1e-3 or 1.0
    inputs = split_off(verified.inputs, columns.clamp(min=least) / float(columns.mean().clamp(min=least)))
    if verified.outputs is None:
        return torch.outer((1 - 8 * UNIT) * verified.rows, inputs)
    outputs = split_off(verified.outputs, torch.ones_like(verified.rows))
    return (1 - 4 * UNIT) * torch.outer(outputs, inputs)


def _ascent(problem: SelectionProblem, verified: VerifiedLoss, split: Tensor, most: int) -> float:
    """Return the highest bound at the points of FISTA with restarts on the relaxation, from V = W."""
    step, weight = _steps(problem.loss, verified), verified.weight
    change = last = torch.zeros_like(weight)
    momentum, best, stale, first = 1.0, -math.inf, 0, math.inf
    for count in range(most + 1):
        if count % EVERY == 0 or count == most:
            bound = _bound(problem, verified, split, change)
            stale = 0 if bound > best + ENOUGH * abs(best) or count == 0 else stale + 1
            best, first = max(best, bound), bound if count == 0 else first
            if stale >= PATIENCE and count >= LEAST and best > first:
                break
        growth = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = change + (momentum - 1) / growth * (change - last)
        # The gradient of the R part, with the linear term of the split part.
        gradient = verified.gradient(ahead)[0] - split * (ahead + weight)
        after = _proximal(problem, split, step, ahead + weight - step * gradient) - weight
        uphill = float(((ahead - after) / step * (after - change)).sum()) > 0
        change, last, momentum = after, change, 1.0 if uphill else growth
    return best


def _steps(loss: LayerLoss, verified: VerifiedLoss) -> Float[Tensor, "out in"]:
    """Return a safe step for every weight."""
    inputs = column_steps(verified.inputs.matrix)
    if verified.outputs is not None:
        return torch.outer(column_steps(verified.outputs.matrix), inputs)
    rows = verified.rows
    return torch.outer(torch.where(rows > 0, 1 / torch.where(rows > 0, rows, 1.0), 1.0), inputs)


def _proximal(problem: SelectionProblem, split: Tensor, step: Tensor, point: Tensor) -> Float[Tensor, "out in"]:
    """Return V = U z / (z + t d), the argmin over V and z of 1/2 sum d V^2 / z + sum (V - U)^2 / (2 t).

    For a price l of keeping a weight z is sqrt(d) |U| / l - t d, clipped to [0, 1]; the price of a group is the one at
    which its z sum to `keep`.
    """
    size, cost = split.sqrt() * point.abs(), step * split
    groups = _groups(problem)
    if groups is None:
        kept = problem.mask(problem.project(size.square())).to(point).expand(point.shape)
    else:
        kept = _kept(size.reshape(groups[0]), cost.reshape(groups[0]), groups[1]).reshape(point.shape)
    whole = kept + cost
    return torch.where(whole > 0, point * kept / torch.where(whole > 0, whole, 1.0), point)


def _kept(size: Float[Tensor, "groups size"], cost: Float[Tensor, "groups size"], keep: int) -> Tensor:
    """Return the z of every group."""
    if keep == 0:
        return torch.zeros_like(size)
    high = size.sum(1, keepdim=True) / keep
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        many = (size / price.clamp(min=torch.finfo(price.dtype).tiny) - cost).clamp(0, 1).sum(1, keepdim=True) > keep
        low, high = torch.where(many, price, low), torch.where(many, high, price)
    return (size / high.clamp(min=torch.finfo(high.dtype).tiny) - cost).clamp(0, 1)


def _groups(problem: SelectionProblem) -> tuple[tuple[int, int], int] | None:
    """Return the shape of a weight by groups that each keep equally many, and their number; None for other patterns."""
    match problem.pattern if isinstance(problem, SparseLeastSquares) else None:
        case Unstructured(keep):
            return (1, problem.loss.weight.numel()), keep
        case RowWise(keep):
            return (problem.loss.weight.shape[0], problem.loss.weight.shape[1]), keep
        case NM(n, m):
            return (problem.loss.weight.numel() // m, m), n
        case _:
            return None


def _bound(problem: SelectionProblem, verified: VerifiedLoss, split: Tensor, change: Tensor) -> float:
    """Return the bound at a change Y."""
    whole, error = verified.gradient(change)
    pull, pull_error = verified.linear_term
    own = split * change
    gradient, error = whole - own, error + 2 * UNIT * (whole.abs() + own.abs())
    size = gradient.abs() + error
    if bool(((size > 0) & (split == 0)).any()):
        return 0.0
    weight, half = verified.weight, split / 2
    # Lower bounds of the least cost of every weight that stays, and of the cost of its removal.
    stays = -torch.where(size > 0, size.square() / (4 * torch.where(split > 0, half, 1.0)), 0.0)
    goes = half * weight.square() - gradient * weight - error * weight.abs()
    gain = goes - stays
    gone = torch.where(problem.mask(problem.project(gain)), 0.0, gain)
    parts = (-change * (whole - pull - own) / 2, stays, gone)
    rounded = (change * whole, change * pull, change * own, stays, half * weight.square(), gradient * weight)
    total, sizes, lost = linalg.numbers(
        torch.stack([part.sum(1).sum() for part in parts]).sum(),
        torch.stack([part.abs().sum() for part in rounded]).sum(),
        (change.abs() * (error + pull_error)).sum(),
    )
    return total + verified.constant / 2 - OUTWARD * (lost + gamma(2 * verified.terms) * sizes)


ACCURACY = 1e-2
"""the relative accuracy of the weighted trace"""
MOST_STEPS = 60
"""the most Newton steps"""
SHRUNK = (1.0, 1 - 1e-8, 1 - 1e-5, 1 - 1e-3, 0.9, 0.5)
"""the factors of the diagonal that are tried until it is proved that it can be split off"""


def split_off(known: KnownMatrix, weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return a d of nonnegative entries, in the units of the matrix M, for which M >= diag(d) is proved.

    In units in which M has a unit diagonal it nearly maximises sum_j q_j d_j, for positive weights q: Newton steps on
    the barrier sum_j q_j d_j + m (log det(M - diag(d)) + sum_j log d_j) with m going to zero, as in minimum trace
    factor analysis. Zero where M cannot be told from a singular matrix. A step costs about 2 n^3.
    """
    scaled = known.scaled
    factor, failed = linalg.try_cholesky(scaled)
    if bool(failed) or not known.margin < 1:
        return torch.zeros_like(weights)
    inverse = torch.cholesky_inverse(factor)
    diagonal = inverse.diagonal()
    inverse = inverse * torch.outer(diagonal.rsqrt(), diagonal.rsqrt())
    split = 0.5 / (largest_eigenvalue_bound(inverse) * diagonal)
    barrier = float((weights * split).sum()) / len(split)
    for _ in range(MOST_STEPS):
        found = _newton(scaled, weights, split, barrier)
        if found is None:
            break
        split, decrement = found
        if decrement > 0.1 * barrier * len(split):
            continue
        if barrier * len(split) <= ACCURACY * float((weights * split).sum()):
            break
        barrier /= 5
    shrunk = next((share for share in SHRUNK if known.exceeds(share * split)), 0.0)
    return (1 - 4 * UNIT) * shrunk * split * known.size.square()


def _newton(
    scaled: Float[Tensor, "n n"], weights: Float[Tensor, " n"], split: Float[Tensor, " n"], barrier: float
) -> tuple[Float[Tensor, " n"], float] | None:
    """Return the point after a damped Newton step, and its decrement; None where float64 has no digits left."""
    factor, failed = linalg.try_cholesky(scaled - torch.diag(split))
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(factor)
    slope = weights - barrier * inverse.diagonal() + barrier / split
    curvature = inverse.square_().mul_(barrier)
    curvature.diagonal().add_(barrier / split.square())
    factor, failed = linalg.try_cholesky(curvature)
    if bool(failed):
        return None
    step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
    decrement, length = float(slope @ step), 1.0
    while length > 1e-9:
        trial = split + length * step
        inside = bool((trial > 0).all()) and not bool(linalg.try_cholesky(scaled - torch.diag(trial))[1])
        if inside:
            break
        length /= 2
    # Short of the boundary, where the barrier is infinite.
    return split + (1.0 if length == 1 else 0.9 * length) * step, decrement
