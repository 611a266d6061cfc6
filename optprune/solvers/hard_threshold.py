"""Iterative hard thresholding: gradient steps projected onto the pattern."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.patterns import within
from optprune.problems import SelectionProblem
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.spectrum import column_steps
from optprune.work import Work, product, selection, sweeps


@dataclass(frozen=True, eq=False)
class ThresholdState:
    """The iterate with its mask, and the step of every column, or of every weight where rows are coupled."""

    steps: Float[Tensor, "*out in"]
    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "rows in"]
    still: int
    """steps since the mask last changed"""


@final
@dataclass(frozen=True)
class HardThreshold(Solver[SelectionProblem, ThresholdState]):
    r"""V <- H(V - S (V A - B) step), step_j = 1 / (L A_jj), L a bound of the largest eigenvalue of the scaled A.

    H keeps the mask with the largest total of u_ij^2 / step_j, which minimises the quadratic upper bound of f over the
    pattern, so the objective never rises. A full output metric S divides the steps by the same bound of its rows.
    Accepts every selection problem. Stops when the mask has not changed for `patience` steps. A step is one product
    [out, in] x [in, in].

    Reference: Blumensath and Davies (2009); AWP (arXiv 2506.10205) for pruning.
    """

    accepts = (SelectionProblem,)

    patience: int = 20

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        step = product(outputs, inputs, inputs) + selection(outputs, inputs) + sweeps(10, outputs, inputs)
        if coupled:
            step += product(outputs, outputs, inputs)
        # The mask changes for about as many steps as the patience.
        flops = measuring(outputs, inputs, coupled=coupled) + 4 * product(inputs, inputs, inputs)
        return Work(flops + 2 * self.patience * step, unfitted(outputs, inputs, coupled=coupled))

    def monotone(self, problem: SelectionProblem) -> bool:
        return True

    def init(self, problem: SelectionProblem, start: Tensor) -> ThresholdState:
        loss = problem.loss
        step = column_steps(loss.gram)
        if loss.metric is not None:
            step = torch.outer(column_steps(loss.metric.matrix), step)
        return ThresholdState(step, start, problem.mask(problem.support(start)), 0)

    def step(self, problem: SelectionProblem, state: ThresholdState) -> ThresholdState:
        point = state.weight - problem.loss.gradient(state.weight) * state.steps
        mask = problem.mask(problem.project(point.square() / state.steps))
        still = state.still + 1 if torch.equal(mask, state.mask) else 0
        return replace(state, weight=within(mask, point), mask=mask, still=still)

    def done(self, problem: SelectionProblem, state: ThresholdState) -> Status | None:
        return Status.CONVERGED if state.still >= self.patience else None

    def value(self, problem: SelectionProblem, state: ThresholdState) -> Tensor:
        return torch.where(state.mask, state.weight, 0.0)
