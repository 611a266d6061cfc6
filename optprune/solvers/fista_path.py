"""A support from a path of reweighted l1 problems with scaled columns, rising strengths and warm starts."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics import linalg
from optprune.numerics.tensors import median_among
from optprune.penalties import WeightedL1
from optprune.problems import PenalisedLeastSquares, SparseLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.fista import Fista, GradientStep
from optprune.solvers.spectrum import column_scale
from optprune.work import Work, selection

FIRST = 1e-5
"""the first strength, as a share of the one at which zero is the answer"""
SOFT = 0.1
"""the addend that keeps the penalty of a zero weight finite"""
USUAL_GROWTH = 1500.0
"""the usual ratio of the last strength to the first, on layers like those of SmolLM2"""


@dataclass(frozen=True, eq=False)
class PathState:
    """A point of the path: the strength, the answer, and the mask of the pattern for it."""

    descent: GradientStep
    scale: Float[Tensor, " in"]
    strength: float
    dense: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    count: int


@final
@dataclass(frozen=True)
class FistaPath(Solver[SparseLeastSquares, PathState]):
    r"""Follow min f(V) + lambda sum_ij w_ij s_j |V_ij| from the dense weights up a geometric path of lambda.

        s_j = sqrt(A_jj),   u_ij = |V_ij| s_j,   w_ij = 1 / ((u_ij / m)^2 + 0.1),   m = half the median of the kept u_ij

    where u_ij counts as at most m outside the pattern's mask for the largest u_ij.
    The w are computed from the previous answer: large weights are nearly free of the penalty and its bias, and small
    ones are driven to zero: a concave penalty, majorised anew at each strength. Each strength is solved by
    `inner_steps` steps of FISTA from the answer before. The path ends when all weights outside the pattern's mask for
    the largest u_ij are zero. From the dense weights it removes weights while the rest compensates for
    them, which ends lower than a path from zero. The start is not used. Follow it with a refit and swaps
    (`fistapruner_plus`).

    A step is `inner_steps` products [out, in] x [in, in], and reads from the device three times.
    Reference: FISTAPruner (arXiv 2408.03728) for the model; Candes, Wakin and Boyd (2008) for reweighting. The
    scaling, the path and its direction are ours.
    """

    accepts = (SparseLeastSquares,)

    ratio: float = 1.5
    inner_steps: int = 10
    most: int = 60

    def __post_init__(self) -> None:
        check_options(self)
        if self.ratio <= 1:
            raise InputError(f"ratio of {self.label} must be more than 1, not {self.ratio}")

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # From the first strength to the one at which the pattern holds.
        steps = min(float(self.most), math.log(USUAL_GROWTH) / math.log(self.ratio))
        flops = measuring(outputs, inputs, coupled=coupled) + steps * 3 * selection(outputs, inputs)
        flops += Fista.steps_flops(outputs, inputs, steps * self.inner_steps, coupled=coupled)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def init(self, problem: SparseLeastSquares, start: Tensor) -> PathState:
        loss = problem.loss
        scale = column_scale(loss.gram)
        strength = FIRST * float((loss.linear / scale).abs().max())
        mask = problem.project((loss.weight * scale).square())
        return PathState(GradientStep.of(loss, scale_columns=True), scale, strength, loss.weight, mask, 0)

    def step(self, problem: SparseLeastSquares, state: PathState) -> PathState:
        size = state.dense.abs() * state.scale
        middle = (median_among(size, state.mask) / 2).clamp(min=torch.finfo(size.dtype).tiny ** 0.25)
        size = size / middle
        # Dropped weights count as small, even where all weights of an N:M group are large.
        size = torch.where(state.mask, size, size.clamp(max=1))
        weights = state.strength * state.scale / (size.square() + SOFT)
        penalised = PenalisedLeastSquares(problem.loss, WeightedL1(weights))
        dense = Fista().iterate(penalised, state.dense, self.inner_steps, state.descent)
        mask = problem.project((dense * state.scale).square())
        strength = state.strength * self.ratio
        return replace(state, strength=strength, dense=dense, mask=mask, count=state.count + 1)

    def done(self, problem: SparseLeastSquares, state: PathState) -> Status | None:
        left, any_kept = linalg.numbers(((state.dense != 0) & ~state.mask).any(), state.mask.any())
        if not left or not any_kept:
            return Status.CONVERGED
        return Status.STEP_LIMIT if state.count >= self.most else None

    def value(self, problem: SparseLeastSquares, state: PathState) -> Tensor:
        return torch.where(state.mask, state.dense, 0.0)
