"""ADMM for sparse weights in the form of ALPS: one eigendecomposition, then a penalty that grows by a schedule."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.patterns import within
from optprune.problems import LayerLoss, SelectionProblem
from optprune.solvers.base import Solver, Status, check_options, measuring
from optprune.solvers.spectrum import column_scale
from optprune.work import Work, eigenvectors, product, selection, storage, sweeps

SCHEDULE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(share of the kept weights that moved, factor for rho): the first share that was exceeded applies"""
USUAL_STEPS = 36
"""the steps until the mask is constant, with the factors of ALPS: 20 to 42 on layers of SmolLM2"""


@dataclass(frozen=True, eq=False)
class AdmmState:
    """The split variables in column-scaled units, and the shared eigendecomposition."""

    scale: Float[Tensor, " in"]
    alive: Bool[Tensor, " in"]
    """the inputs that are not zero on all tokens"""
    values: Float[Tensor, "*out in"]
    """eigenvalues of A', or the products of those of S and of A'"""
    vectors: Float[Tensor, "in in"]
    row_vectors: Float[Tensor, "out out"] | None
    """the eigenvectors of S, where rows are coupled"""
    target: Float[Tensor, "out in"]
    """S B / scale; in the eigenbases where rows are coupled"""
    inverse: Float[Tensor, "in in"] | None
    """(A' + rho I)^-1; None where rows are coupled"""
    sparse: Float[Tensor, "out in"]
    dual: Float[Tensor, "out in"]
    rho: float
    mask: Bool[Tensor, "rows in"]
    checked_mask: Bool[Tensor, "rows in"]
    """the mask at the last check of the schedule"""
    count: int
    frozen: bool


@final
@dataclass(frozen=True)
class Admm(Solver[SelectionProblem, AdmmState]):
    r"""Alternating direction method of multipliers on the split V = Z, Z in the pattern, with scaled columns.

    In the units of V' = V diag(s), s_j = sqrt(A_jj), A' = diag(1/s) A diag(1/s), B' = B diag(1/s):

        V' = (B' - U + rho Z)(A' + rho I)^-1,   Z = H(V' + U / rho),   U <- U + rho (V' - Z)

    H keeps the mask of the pattern with the largest total of squares, in which weights of dead inputs (A_jj = 0) count
    nothing. One eigendecomposition of A' serves every rho.
    Under a full output metric S the first step solves S V' A' + rho V' = S B' - U + rho Z, which is as exact in the
    eigenbases of S and A'.
    Every `every` steps rho grows by 1.3, 1.2 or 1.1 where more than 10, 0.5 or 0 percent of the mask changed,
    and the method stops when nothing did. `haste` is an exponent on these factors: 1 is that of ALPS; a third takes
    about twice the steps and ends lower. Accepts every selection problem. Not monotone: follow it with a refit.

    The released code of ALPS differs in three places. Its first Z is the dense weight cut to the pattern; here
    it is the dense weight. Until more than 0.5 percent changed for the first time, fewer divide rho by 5 (and unless it
    was none, the method restarts); here rho grows by 1.1, or the method stops. After 30 steps it stops below
    0.03 percent; here only at none.

    A step is one product [out, in] x [in, in], and one [in, in] x [in, in] when rho grows; where rows are coupled it is
    two, and two [out, out] x [out, in]. Memory 2 in^2 + 5 out in.
    Reference: ALPS (arXiv 2406.07831), the factors of its schedule from the released code; the refit is a solver of its
    own here.
    """

    accepts = (SelectionProblem,)

    rho: float = 0.1
    haste: float = 1.0
    every: int = 3
    most: int = 300

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        steps = min(self.most, USUAL_STEPS / self.haste * self.every / 3)
        step = product(outputs, inputs, inputs) + selection(outputs, inputs) + sweeps(4, outputs, inputs)
        if coupled:
            step += product(outputs, inputs, inputs) + 2 * product(outputs, outputs, inputs)
            peak = storage(outputs, inputs, 10.3, 75.6, 19.0)
        else:
            step += product(inputs, inputs, inputs) / self.every
            peak = storage(outputs, inputs, 16.1, 48.1, 3.0)
        once = measuring(outputs, inputs, coupled=coupled) + eigenvectors(inputs) + eigenvectors(outputs) * coupled
        return Work(once + steps * step, peak)

    @property
    def cached_bytes(self) -> int:
        return 4  # the eigenvectors, in float32

    def init(self, problem: SelectionProblem, start: Tensor) -> AdmmState:
        loss = problem.loss
        scale = column_scale(loss.gram)
        values, vectors = _decomposed(loss, scale)
        values, row_vectors = values.clamp(min=0), None
        target = loss.linear / scale
        if loss.coupled:
            assert loss.metric is not None
            row_values, row_vectors = linalg.eigh(loss.metric.matrix)
            values = torch.outer(row_values.clamp(min=0), values)
            target = row_vectors.T @ target @ vectors
        dense = loss.weight * scale
        alive = loss.gram.diagonal() > 0
        # The first Z is the dense weight: the start is not used.
        mask = problem.mask(problem.project(within(alive, dense.square())))
        return AdmmState(
            scale=scale,
            alive=alive,
            values=values,
            vectors=vectors,
            row_vectors=row_vectors,
            target=target,
            inverse=None if loss.coupled else _inverse(values, vectors, self.rho, torch.empty_like(vectors)),
            sparse=dense,
            dual=torch.zeros_like(dense),
            rho=self.rho,
            mask=mask,
            checked_mask=mask,
            count=0,
            frozen=False,
        )

    def step(self, problem: SelectionProblem, state: AdmmState) -> AdmmState:
        point = _dense(state).add_(state.dual, alpha=1 / state.rho)
        mask = problem.mask(problem.project(within(state.alive, point.square())))
        sparse = within(mask, point)
        count = state.count + 1
        # U + rho (V' - Z) = rho (point - Z): the new dual is the part that the pattern dropped.
        state = replace(state, sparse=sparse, dual=point.sub_(sparse).mul_(state.rho), mask=mask, count=count)
        if count % self.every:
            return state
        changed, kept = linalg.numbers(torch.count_nonzero(mask ^ state.checked_mask), torch.count_nonzero(mask))
        moved = changed / max(1, kept)
        factor = next((factor for share, factor in SCHEDULE if moved > share), 1.0)
        rho = state.rho * factor**self.haste
        if state.inverse is not None and rho != state.rho:
            # Written over the previous inverse, which is as large as the Gram matrix.
            state = replace(state, inverse=_inverse(state.values, state.vectors, rho, state.inverse))
        return replace(state, rho=rho, checked_mask=mask, frozen=moved == 0)

    def done(self, problem: SelectionProblem, state: AdmmState) -> Status | None:
        if state.frozen:
            return Status.CONVERGED
        return Status.STEP_LIMIT if state.count >= self.most else None

    def value(self, problem: SelectionProblem, state: AdmmState) -> Tensor:
        return torch.where(state.mask, state.sparse / state.scale, 0.0)


def _decomposed(loss: LayerLoss, scale: Float[Tensor, " in"]) -> tuple[Float[Tensor, " in"], Float[Tensor, "in in"]]:
    """Return the eigendecomposition of A', cached for all layers with the same inputs and damping."""
    known = loss.moments.decompositions
    if loss.fit_bias not in known or not torch.equal(known[loss.fit_bias][0], loss.damping):
        unit = torch.outer(scale, scale)
        # Its transpose is stored by columns, as LAPACK needs it.
        known[loss.fit_bias] = loss.damping, *linalg.eigh_in_place(torch.div(loss.gram.mT, unit, out=unit).mT)
    _, values, vectors = known[loss.fit_bias]
    return values, vectors


def _inverse(
    values: Float[Tensor, " in"], vectors: Float[Tensor, "in in"], rho: float, room: Float[Tensor, "in in"]
) -> Float[Tensor, "in in"]:
    """Return (A' + rho I)^-1 from the eigendecomposition of A', written into `room`."""
    return torch.mm(vectors / (values + rho), vectors.T, out=room)


def _dense(state: AdmmState) -> Float[Tensor, "out in"]:
    """Return V', the minimiser without the pattern."""
    if state.inverse is not None:
        return torch.add(state.target, state.sparse, alpha=state.rho).sub_(state.dual) @ state.inverse
    rows = state.row_vectors
    assert rows is not None
    right = state.rho * state.sparse - state.dual
    inside = (state.target + rows.T @ right @ state.vectors) / (state.values + state.rho)
    return rows @ inside @ state.vectors.T
