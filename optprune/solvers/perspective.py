"""A lower bound for mixed-integer problems: the perspective relaxation, by its dual, from any weight."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.problems import LayerLoss, SelectionProblem
from optprune.solvers.base import Solver, check_options
from optprune.solvers.solution import Certificate, Status


@dataclass(frozen=True, eq=False)
class PerspectiveState:
    """The dual ascent: a point that gives a bound, and the best bound so far."""

    start: Tensor
    split: Float[Tensor, "*out in"]
    """the diagonal d that was split off A, or off S (x) A"""
    rest: Float[Tensor, "in in"]
    """A - diag(d), positive semidefinite; A itself where rows are coupled"""
    length: float
    point: Float[Tensor, "out in"]
    previous: Float[Tensor, "out in"]
    bound: float
    count: int


@final
@dataclass(frozen=True)
class PerspectiveBound(Solver[SelectionProblem, PerspectiveState]):
    r"""A lower bound on min f over a pattern; a feasible weight it starts from is returned as it came.

    Split A = R + diag(d), R positive semidefinite. Writing the diagonal part as v^2 / z with z in [0, 1] relaxes the
    choice (Frangioni and Gentile, 2006; Xie and Deng, 2020), and the dual of that relaxation is, for any X [out, in],

        c/2 - 1/2 tr(X R X^T) - 1/2 max_M sum_{ij in M} T_ij^2 / d_j,   T = B - X R,

    where M runs over the masks of the problem, so its exact projection gives the inner maximum: the bound holds for
    every pattern and every X. Under a full output metric X R becomes S X A - d * X and B becomes S B, with d_ij = s_i
    d_j: where S - diag(s) and A - diag(d) are positive semidefinite, so is S (x) A - diag(s) (x) diag(d). X is improved
    by `most` steps of proximal ascent on the relaxation. The split takes d_j = t / (A^-1)_jj with the largest t that
    keeps R positive semidefinite. Accepts every selection problem; where A is singular it takes d from the damping
    alone, or refuses nothing and proves 0.

    A step is two products [out, in] x [in, in] in float64.
    """

    accepts = (SelectionProblem,)

    most: int = 100

    def __post_init__(self) -> None:
        check_options(self)

    def monotone(self, problem: SelectionProblem) -> bool:
        return True

    def init(self, problem: SelectionProblem, start: Tensor) -> PerspectiveState:
        loss = problem.loss
        split, rest = diagonal_split(loss), loss.gram.double()
        if loss.metric is None:
            rest = rest - torch.diag(split)
        # Where nothing is left of A (width 1, dead inputs) the bound depends on no X, and any step will do.
        length = linalg.spectral_norm(rest) or 1.0
        if loss.metric is not None:
            rows = loss.metric.matrix.double()
            split = torch.outer(_split(rows, loss.metric.damping.double()), split)
            length *= linalg.spectral_norm(rows) or 1.0
        point = start.double()
        bound = _bound(problem, split, rest, point)
        return PerspectiveState(problem.within_support(start), split, rest, length, point, point, bound, 0)

    def step(self, problem: SelectionProblem, state: PerspectiveState) -> PerspectiveState:
        momentum = state.count / (state.count + 3)
        ahead = state.point + momentum * (state.point - state.previous)
        # Gradient step on the smooth part 1/2 tr(X R X^T) - tr(X B^T), then the prox of the perspective term,
        # approximated by its value on the best mask of the point: weights inside shrink by 1 / (1 + d / L).
        gradient = _product(problem.loss, state.split, state.rest, ahead) - problem.loss.linear.double()
        trial = ahead - gradient / state.length
        mask = problem.mask(problem.project(trial.square() * state.split))
        point = torch.where(mask, trial / (1 + state.split / state.length), 0.0)
        bound = max(state.bound, _bound(problem, state.split, state.rest, point))
        return replace(state, point=point, previous=state.point, bound=bound, count=state.count + 1)

    def done(self, problem: SelectionProblem, state: PerspectiveState) -> Status | None:
        return Status.CONVERGED if state.count >= self.most else None

    def value(self, problem: SelectionProblem, state: PerspectiveState) -> Tensor:
        return state.start

    def certify(self, problem: SelectionProblem, state: PerspectiveState) -> Certificate | None:
        return Certificate(state.bound, "dual of the perspective relaxation")


def _bound(
    problem: SelectionProblem,
    split: Float[Tensor, "*out in"],
    rest: Float[Tensor, "in in"],
    point: Float[Tensor, "out in"],
) -> float:
    product = _product(problem.loss, split, rest, point)
    dual = problem.loss.linear.double() - product
    usable = split > 0
    boundless = ((dual != 0) & ~usable).any()
    score = dual.square() / torch.where(usable, split, 1.0)
    chosen = torch.where(problem.mask(problem.project(score)), score, 0.0)
    quadratic, linear, nothing = linalg.numbers((product * point).sum(), chosen.sum(), boundless.double())
    return 0.0 if nothing else max(problem.loss.constant / 2 - quadratic / 2 - linear / 2, 0.0)


def _product(
    loss: LayerLoss, split: Float[Tensor, "*out in"], rest: Float[Tensor, "in in"], point: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """X R."""
    return point @ rest if loss.metric is None else loss.weigh(point @ rest) - split * point


def diagonal_split(loss: LayerLoss) -> Float[Tensor, " in"]:
    """d >= 0 with A - diag(d) positive semidefinite: t / (A^-1)_jj with the largest such t, a hair less for rounding.

    The damping alone where A is singular.
    """
    return _split(loss.gram.double(), loss.damping.double())


def _split(matrix: Float[Tensor, "n n"], damping: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    factor, failed = linalg.try_cholesky(matrix)
    if bool(failed):
        return damping
    scale = torch.cholesky_inverse(factor).diagonal().sqrt()
    values = linalg.eigvalsh(matrix * torch.outer(scale, scale))
    rounding = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
    return max(float(values[0]) - rounding, 0.0) / scale.square()
