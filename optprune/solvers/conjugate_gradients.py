"""Refit on a fixed mask by conjugate gradients, all rows at once."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.patterns import within
from optprune.problems import LayerLoss, MaskedLeastSquares, SelectionProblem
from optprune.solvers.base import Certificate, Solver, Status, check_options, measuring
from optprune.solvers.restore import Restorable, fixed_mask, restored_bound
from optprune.work import Work, product, storage, sweeps

STEPS_PER_DIGIT = 11
"""the steps per decimal digit of the residual: 10 to 15 on layers like those of SmolLM2, damped by 1 percent; as many
under a full metric from the answer of ADMM, and up to 100 from an answer that ignores the metric"""


@dataclass(frozen=True, eq=False)
class GradientsState:
    """The vectors of conjugate gradients, one system per row, or one for all rows where they are coupled."""

    mask: Bool[Tensor, "rows in"]
    diagonal: Float[Tensor, "*out in"]
    """the diagonal of A, or of S (x) A"""
    inverse_diagonal: Float[Tensor, "*out in"]
    weight: Float[Tensor, "out in"]
    residual: Float[Tensor, "out in"]
    """-S (V A - B) on the mask"""
    direction: Float[Tensor, "out in"]
    energy: Float[Tensor, " out"]
    """<r, diag(A)^-1 r> of each row's system"""
    target: Float[Tensor, " out"]
    """the energy at which a row is done"""
    rounding: Float[Tensor, " out"]
    """the energy at or below which a residual may be rounding of the moments"""
    stuck: Bool[Tensor, " out"]
    """rows whose direction has no more curvature than rounding: A is singular on their mask"""
    settled: Bool[Tensor, " out"]
    """rows whose residual has been so small that it may be rounding"""


@final
@dataclass(frozen=True)
class ConjugateGradients(Solver[Restorable, GradientsState]):
    r"""Solve (V A - B)_M = 0, V = 0 outside M, by conjugate gradients with the diagonal of A as preconditioner.

    Accepts restoration problems, and selection problems, where it refits on the support of the start; entries of a
    start outside the mask are ignored. A row whose start costs more than the masked original weights begins at those:
    next to a large start the answer would be rounding. A row is done when its preconditioned residual is `tolerance` of
    that of the masked original weights. A row whose direction has no curvature beyond rounding (a singular A) stops,
    and the status says so, unless its residual is so small that it may be rounding of the moments.

    A step is one product [out, in] x [in, in], whatever the masks: for masks that differ between rows it is far
    cheaper than a factorisation per row. Never worse than its start; not exact, but certified where the loss is damped:
    f(V) - min f <= 1/2 sum_ij r_ij^2 / D_j, where one Cholesky factorisation proves that A >= D. A full output metric
    couples the rows into one system, with S_ii A_jj as preconditioner, one more product [out, out] x [out, in] a step,
    and S_ii's share of damping in the certificate.

    Reference: Hestenes and Stiefel (1952); ALPS (arXiv 2406.07831) for masks.
    """

    accepts = (MaskedLeastSquares, SelectionProblem)

    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        step = product(outputs, inputs, inputs) + sweeps(20, outputs, inputs)
        if coupled:
            step += product(outputs, outputs, inputs)
        steps = STEPS_PER_DIGIT * max(1.0, -math.log10(self.tolerance))
        form = (10.3, 75.6, 19.0) if coupled else (16.1, 48.1, 3.0)
        once = measuring(outputs, inputs, coupled=coupled)
        return Work(once + steps * step, storage(outputs, inputs, *form))

    def monotone(self, problem: Restorable) -> bool:
        return True

    def init(self, problem: Restorable, start: Tensor) -> GradientsState:
        mask = fixed_mask(problem, start)
        start = torch.where(mask, start, 0.0)
        loss = problem.loss
        diagonal = loss.gram.diagonal()
        if loss.coupled:
            assert loss.metric is not None
            diagonal = torch.outer(loss.metric.diagonal, diagonal)
        inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
        own = torch.where(mask, loss.weight, 0.0)
        slope = torch.where(mask, loss.gradient(own), 0.0)
        scale = _by_system(loss, slope.square().mul_(inverse))
        target = self.tolerance**2 * scale
        residual = torch.where(mask, loss.gradient(start), 0.0).neg_()
        # Twice what the start costs more, by the gradients at both. Written so that an overflow is far.
        near = _by_system(loss, (start - own).mul_(slope - residual)) <= 0
        near = (near | (_by_system(loss, residual.square().mul_(inverse)) <= scale))[:, None]
        start, residual = torch.where(near, start, own), torch.where(near, residual, slope.neg_())
        del own, slope
        direction = residual * inverse
        energy = _by_system(loss, residual * direction)
        # Original weights that are optimal as they are would ask for a residual of exactly zero.
        rounding = torch.finfo(energy.dtype).eps ** 2 * (energy + _by_system(loss, loss.linear.square().mul_(inverse)))
        stuck = torch.zeros_like(energy, dtype=torch.bool)
        target, known = target.maximum(rounding), _rounding(loss, mask).to(energy)
        settled = energy <= known
        return GradientsState(
            mask, diagonal, inverse, start, residual, direction, energy, target, known, stuck, settled
        )

    def step(self, problem: Restorable, state: GradientsState) -> GradientsState:
        loss = problem.loss
        product = within(state.mask, loss.weigh(state.direction @ loss.gram))
        curvature = _by_system(loss, state.direction * product)
        # The rounding of a matrix with unit diagonal has a curvature of this size.
        unit = state.direction.shape[1] * torch.finfo(product.dtype).eps
        least = unit * _by_system(loss, state.direction.square().mul_(state.diagonal))
        stuck = state.stuck | ((state.energy > state.target) & ~(curvature > least))
        active = (state.energy > state.target) & ~stuck
        length = torch.where(active, state.energy / torch.where(active, curvature, 1.0), 0.0)[:, None]
        residual = torch.addcmul(state.residual, length, product, value=-1)
        preconditioned = residual * state.inverse_diagonal
        energy = torch.where(active, _by_system(loss, residual * preconditioned), state.energy)
        ratio = torch.where(active, energy / torch.where(active, state.energy, 1.0), 0.0)[:, None]
        return replace(
            state,
            weight=torch.addcmul(state.weight, length, state.direction),
            residual=residual,
            direction=torch.addcmul(preconditioned, ratio, state.direction),
            energy=energy,
            stuck=stuck,
            settled=state.settled | (energy <= state.rounding),
        )

    def done(self, problem: Restorable, state: GradientsState) -> Status | None:
        # Where the residual is rounding, so are the directions: where A is singular they have no curvature.
        met = (state.energy <= state.target) | (state.stuck & state.settled)
        converged, over = linalg.numbers(met.all(), (met | state.stuck).all())
        if converged:
            return Status.CONVERGED
        return Status.STALLED if over else None

    def value(self, problem: Restorable, state: GradientsState) -> Tensor:
        return state.weight

    def prove(self, problem: Restorable, value: Tensor) -> Certificate | None:
        # Without damping the residual does not bound the excess.
        if not isinstance(problem, MaskedLeastSquares) or not bool((problem.loss.damping > 0).all()):
            return None
        return restored_bound(problem, value)


def _rounding(loss: LayerLoss, mask: Bool[Tensor, "rows in"]) -> Float[Tensor, " out"]:
    """Return the energy of each row's system that may be rounding of the moments, for any V: that of V = 0."""
    rows = loss.residual_rounding(torch.zeros_like(loss.weight))
    if loss.coupled:
        assert loss.metric is not None
        size = replace(loss.metric, average=loss.metric.average.abs()).to(rows.dtype)
        rows = size.apply(rows[:, None])[:, 0] / size.diagonal.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    return _by_system(loss, rows.square()[:, None] * mask.sum(1, keepdim=True))


def _by_system(loss: LayerLoss, terms: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """Return the sum of the terms of each row's system: over the row, or over all rows where they are coupled."""
    rows = terms.sum(1)
    return rows.sum().expand(rows.shape) if loss.coupled else rows
