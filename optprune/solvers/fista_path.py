"""A support from the l1 path: scaled columns, geometric strengths, warm starts; no start is used."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.penalties import WeightedL1
from optprune.problems import PenalisedLeastSquares, Problem, SelectionProblem
from optprune.solvers.base import Solver
from optprune.solvers.fista import Fista, GradientStep
from optprune.solvers.solution import Status
from optprune.solvers.spectrum import column_scale


@dataclass(frozen=True, eq=False)
class PathState:
    """Where the path is: the strength, the l1 answer there, and what the pattern makes of it."""

    descent: GradientStep
    scale: Float[Tensor, " in"]
    strength: float
    dense: Float[Tensor, "out in"]
    mask: Bool[Tensor, "rows in"]
    rounds: int
    """reweighted rounds after the path had enough non-zeros"""
    reached: bool


@final
@dataclass(frozen=True)
class FistaPath(Solver[PathState]):
    r"""Follow the answers of min f(V) + lambda sum_ij s_j |V_ij|, s_j = sqrt(A_jj), from V = 0 down a geometric path.

    Each strength is solved by `inner_steps` steps of FISTA from the answer before, until the answer has as many
    non-zeros as the pattern keeps. Then `rounds` reweighted rounds make large weights cheap and small ones dear,
    lambda s_j / (|V_ij| s_j / m + 1/2) with m the median size of a kept weight, which takes the bias of the l1 norm
    away. The mask is the pattern's for the largest |V_ij| s_j, and the weights are those of the last answer on it.
    The start is not used. Accepts every selection problem. Follow it with a refit and swaps (`fistapruner_plus`).

    A step is `inner_steps` products [out, in] x [in, in].
    Reference: FISTAPruner (arXiv 2408.03728) for the model; Friedman, Hastie and Tibshirani (2010) for paths with
    warm starts; Candes, Wakin and Boyd (2008) for reweighting. The scaling and the combination are ours.
    """

    ratio: float = 0.7
    inner_steps: int = 15
    rounds: int = 8

    def why_not(self, problem: Problem) -> str | None:
        if isinstance(problem, SelectionProblem):
            return None
        return f"it looks for a support, and a {problem.kind} problem has none to choose"

    def init(self, problem: Problem, start: Tensor) -> PathState:
        assert isinstance(problem, SelectionProblem)
        scale = column_scale(problem.loss.gram)
        dense = torch.zeros_like(problem.loss.weight)
        # Above this strength zero is the answer.
        strength = float((problem.loss.linear / scale).abs().max())
        mask = problem.mask(problem.project(dense))
        if not bool(mask.any()):
            strength = 0.0
        descent = GradientStep.of(problem.loss, scale_columns=True)
        return PathState(descent, scale, strength, dense, mask, 0, strength == 0)

    def step(self, problem: Problem, state: PathState) -> PathState:
        assert isinstance(problem, SelectionProblem)
        strength, weights = state.strength, state.strength * state.scale
        if state.reached:
            size = state.dense.abs() * state.scale
            median = size[state.mask.expand_as(size)].median().clamp(min=torch.finfo(size.dtype).tiny)
            weights = weights / (size / median + 0.5)
        else:
            strength = strength * self.ratio
            weights = weights * self.ratio
        penalised = PenalisedLeastSquares(problem.loss, WeightedL1(weights))
        dense = Fista().iterate(penalised, state.dense, self.inner_steps, state.descent)
        mask = problem.mask(problem.project((dense * state.scale).square()))
        kept = int(mask.expand_as(dense).sum())
        # An answer may never fill the mask where inputs are dead or rows are zero: stop at a vanishing strength.
        vanishing = strength < 1e-7 * float((problem.loss.linear / state.scale).abs().max())
        reached = state.reached or int((dense != 0).sum()) >= kept or vanishing
        return replace(
            state, strength=strength, dense=dense, mask=mask, rounds=state.rounds + state.reached, reached=reached
        )

    def done(self, problem: Problem, state: PathState) -> Status | None:
        return Status.CONVERGED if state.reached and (state.rounds >= self.rounds or state.strength == 0) else None

    def value(self, problem: Problem, state: PathState) -> Tensor:
        return torch.where(state.mask, state.dense, 0.0)
