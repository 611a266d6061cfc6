"""FISTAPruner as published: short l1 solves, hard rounding, and a bisection on the strength of the penalty."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from optprune.numerics import linalg
from optprune.penalties import L1
from optprune.problems import PenalisedLeastSquares, Problem, SparseLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.fista import Fista, GradientStep
from optprune.work import Work

LEAST = 1e-8
"""the least strength of the penalty tried, as a share of the strength at which zero is the answer"""
USUAL_STEPS = 7.0
"""the usual number of strengths, on layers like those of SmolLM2"""


@dataclass(frozen=True, eq=False)
class FistaPrunerState:
    """The best feasible weight, and the bracket of the strength in logarithms."""

    descent: GradientStep
    strongest: float
    """the strength of the penalty at which zero is the answer"""
    floor: float
    """the error of the original weights, from which errors are measured by the change"""
    best: Tensor
    error: float
    """the error of `best`, infinite for an infeasible start"""
    low: float
    high: float
    failures: int


@final
@dataclass(frozen=True)
class FistaPruner(Solver[SparseLeastSquares, FistaPrunerState]):
    r"""Alternate K steps of FISTA on the l1 problem, from the best weight so far, with rounding to the pattern.

        V_K = FISTA(lambda, K, from V_best),   V = H(V_K) by plain magnitude,
        E = |V X* - W X|,   E_round = E - |V_K X* - W X|;   keep V if its E is less, else count a failure
        raise lambda if E_round / E > xi, else lower it, by bisection; stop after T failures in a row, or when
        the bracket of lambda is narrower than `narrow`, 0.1: its ends then differ by 10 percent

    The second stopping rule is ours, against endless tiny gains. The paper leaves the bracket open: here it is
    geometric, from 1e-8 to 1 times the strength max |S B| at which zero is the answer, so that scaling the problem
    changes nothing. Errors include the damping of the loss, if any. Zeros are not frozen, so the mask may change.
    Monotone; as published, it depends on its start: in a chain that is the answer before it, in the paper SparseGPT's
    for OPT (the recipe fistapruner) and Wanda's for LLaMA (fistapruner_wanda). An infeasible start,
    such as the dense weights, has an infinite error, so that the first rounding replaces it. A step is K products
    [out, in] x [in, in] and two more to measure, and reads from the device twice.

    Reference: FISTAPruner (arXiv 2408.03728), Algorithm 1, reconstructed from public reviews: K = 20, T = 3, xi = 0.3.
    """

    accepts = (SparseLeastSquares,)

    inner_steps: int = 20
    patience: int = 3
    share: float = 0.3
    narrow: float = 0.1

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        flops = measuring(outputs, inputs, coupled=coupled)
        flops += Fista.steps_flops(outputs, inputs, USUAL_STEPS * (self.inner_steps + 2), coupled=coupled)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def monotone(self, problem: SparseLeastSquares) -> bool:
        return True

    def init(self, problem: SparseLeastSquares, start: Tensor) -> FistaPrunerState:
        descent = GradientStep.of(problem.loss, scale_columns=False)
        floor = problem.objective(problem.loss.weight)
        (error,) = _errors(problem, floor, start) if problem.violation(start) == 0 else (math.inf,)
        strongest = float(problem.loss.linear.abs().max())
        return FistaPrunerState(descent, strongest, floor, start, error, math.log(LEAST), 0.0, 0)

    def step(self, problem: SparseLeastSquares, state: FistaPrunerState) -> FistaPrunerState:
        middle = (state.low + state.high) / 2
        penalty = L1(math.exp(middle) * state.strongest)
        fista = Fista(scale_columns=False, restart=False)
        dense = fista.iterate(PenalisedLeastSquares(problem.loss, penalty), state.best, self.inner_steps, state.descent)
        rounded = _rounded(problem, dense)
        total, before = _errors(problem, state.floor, rounded, dense)
        from_rounding = total - before
        if total > 0 and from_rounding / total > self.share:
            state = replace(state, low=middle)
        else:
            state = replace(state, high=middle)
        # Errors are measured in the dtype of the problem: less than its rounding is no improvement.
        if total < state.error * (1 - 10 * torch.finfo(dense.dtype).eps):
            return replace(state, best=rounded, error=total, failures=0)
        return replace(state, failures=state.failures + 1)

    def done(self, problem: SparseLeastSquares, state: FistaPrunerState) -> Status | None:
        # Without the second rule ever smaller improvements would keep the first from applying.
        found = state.failures >= self.patience or state.high - state.low < self.narrow
        return Status.CONVERGED if found else None

    def value(self, problem: SparseLeastSquares, state: FistaPrunerState) -> Tensor:
        return state.best if math.isfinite(state.error) else _rounded(problem, state.best)


def _rounded(problem: SparseLeastSquares, weight: Tensor) -> Tensor:
    """Return H(V): the largest weights of the pattern."""
    return torch.where(problem.pattern.project(weight.abs()), weight, 0.0)


def _errors(problem: Problem, floor: float, *weights: Tensor) -> list[float]:
    """Return sqrt(2 f(V)) for each V, from f(V) = f(W) + <V - W, gradient at V + gradient at W> / 2."""
    loss, rises = problem.loss, list[Tensor]()
    for weight in weights:
        gradient = loss.gradient(weight)
        if loss.pull is not None:
            gradient = gradient + loss.weigh(loss.pull)
        rises.append(((weight - loss.weight) * gradient).sum(dtype=torch.float64))
    return [math.sqrt(2 * max(floor + rise / 2, 0.0)) for rise in linalg.numbers(*rises)]
