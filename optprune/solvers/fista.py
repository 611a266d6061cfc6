"""FISTA: accelerated proximal gradient for any penalty, with a duality gap from any iterate."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers.base import Solver, check_options, measuring, unfitted
from optprune.solvers.duality import GapMonitor, StopsAtGap, gap_flops
from optprune.solvers.spectrum import column_steps, largest_eigenvalue_bound
from optprune.work import Work, product, sweeps

RESTART_EVERY = 4
"""steps between two tests for a restart: a test costs as much memory traffic as the rest of a step"""
STEPS_PER_DIGIT = 80
"""the steps per decimal digit of the gap, on layers of SmolLM2 with a penalty that leaves half of the weights"""


@dataclass(frozen=True, eq=False)
class GradientStep:
    """The map V -> V - S (V A - B) step, which depends on the loss alone, so it is computed once per loss.

    Without an output metric it is V matrix + shift, in one product.
    """

    step: Tensor
    """the step for every column [in], for every weight [out, in], or one for all, []"""
    matrix: Float[Tensor, "in in"]
    """I - A diag(step); A where there is a metric"""
    shift: Float[Tensor, "out in"]
    """S B step"""
    metric: OutputMetric | None

    @classmethod
    def of(cls, loss: LayerLoss, *, scale_columns: bool) -> "GradientStep":
        """Return the longest safe step: 1 / L for all columns, or 1 / (L A_jj) with L that of A with unit diagonal.

        A metric S divides either by the same bound of S.
        """
        gram, metric = loss.gram, loss.metric
        if scale_columns:
            step = column_steps(gram)
            if metric is not None:
                step = torch.outer(column_steps(metric.matrix), step)
        else:
            largest = largest_eigenvalue_bound(gram)
            if metric is not None:
                largest *= largest_eigenvalue_bound(metric.matrix)
            step = torch.as_tensor(1 / (largest or 1.0), dtype=gram.dtype, device=gram.device)
        matrix = gram
        if metric is None:
            matrix = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) - gram * step
        return cls(step, matrix, loss.linear * step, metric)

    def at(self, weight: Float[Tensor, "out in"], out: Tensor | None = None) -> Float[Tensor, "out in"]:
        """Return the gradient step from a weight, written into `out` if that is given."""
        if self.metric is None:
            return torch.addmm(self.shift, weight, self.matrix, out=out)
        return weight + self.shift - self.step * self.metric.apply(weight @ self.matrix)


@dataclass(frozen=True, eq=False)
class Iterates:
    """The last two iterates with their gradient points."""

    descent: GradientStep
    weight: Float[Tensor, "out in"]
    point: Float[Tensor, "out in"]
    """the gradient step from `weight`"""
    last_weight: Float[Tensor, "out in"]
    last_point: Float[Tensor, "out in"]
    momentum: Float[Tensor, ""]
    """t, a float64 tensor on the device of the weights, so that a restart does not wait for the device"""
    count: int


@dataclass(frozen=True, eq=False)
class FistaState:
    """The iterates and the gap."""

    iterates: Iterates
    monitor: GapMonitor


@final
@dataclass(frozen=True)
class Fista(StopsAtGap, Solver[PenalisedLeastSquares, FistaState]):
    r"""Minimise f(V) + P(V) by accelerated proximal gradient steps with adaptive restart.

        Y = V_k + ((t_k - 1) / t_(k+1)) (V_k - V_(k-1)),   V_(k+1) = prox_(step P)(Y - S (Y A - B) step),
        t_(k+1) = (1 + sqrt(1 + 4 t_k^2)) / 2,   t = 1 again when <Y - V_(k+1), V_(k+1) - V_k> > 0

    The step is 1 / L with L an upper bound of the largest eigenvalue of A, or, with `scale_columns` and a separable
    penalty, 1 / (L A_jj) with L that of A scaled to a unit diagonal; an output metric S divides it by the same bound of
    S, because rows are not scaled here. Accepts penalised least squares with any penalty. Stops when the relative
    duality gap is at most `tolerance`, measured in float64 at steps that lie further and further apart; returns the
    best iterate seen at a check, so it is never worse than its start.

    A step is one product [out, in] x [in, in] and a few passes over [out, in], and reads from the device only where it
    checks the gap; memory 6 out in + 3 in^2.
    Reference: Beck and Teboulle (2009); O'Donoghue and Candes (2015) for the restart; FISTAPruner (arXiv 2408.03728).
    """

    tolerance: float = 1e-6
    scale_columns: bool = True
    restart: bool = True

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        steps = STEPS_PER_DIGIT * max(1.0, -math.log10(self.tolerance))
        flops = measuring(outputs, inputs, coupled=coupled) + gap_flops(outputs, inputs, steps, coupled=coupled)
        flops += self.steps_flops(outputs, inputs, steps, coupled=coupled)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    @staticmethod
    def steps_flops(outputs: int, inputs: int, steps: float, *, coupled: bool = False) -> float:
        """Return the flops of so many steps, with the bound of the largest eigenvalue before the first."""
        step = product(outputs, inputs, inputs) + sweeps(20, outputs, inputs)
        if coupled:
            step += product(outputs, outputs, inputs)
        return 5 * product(inputs, inputs, inputs) + steps * step

    def init(self, problem: PenalisedLeastSquares, start: Tensor) -> FistaState:
        return FistaState(self._begin(problem, start), GapMonitor.of(problem, start))

    def iterate(
        self, problem: PenalisedLeastSquares, start: Tensor, steps: int, descent: GradientStep | None = None
    ) -> Tensor:
        """Return the iterate after exactly `steps` steps, without measuring, for methods that use a few as a part.

        These solve many problems with the same loss and may pass its `descent`.
        """
        iterates = self._begin(problem, start, descent)
        for _ in range(steps):
            iterates = self._move(problem, iterates)
        return iterates.weight

    def _begin(self, problem: PenalisedLeastSquares, start: Tensor, descent: GradientStep | None = None) -> "Iterates":
        if descent is None:
            scaled = self.scale_columns and problem.penalty.separable
            descent = GradientStep.of(problem.loss, scale_columns=scaled)
        point = descent.at(start)
        momentum = torch.ones((), dtype=torch.float64, device=start.device)
        return Iterates(descent, start, point, start, point.clone(), momentum, 0)

    def _move(self, problem: PenalisedLeastSquares, state: "Iterates") -> "Iterates":
        """Return the state after a step, which overwrites the points of the given state to save allocations."""
        momentum = (1 + (1 + 4 * state.momentum.square()).sqrt()) / 2
        ahead = (1 + (state.momentum - 1) / momentum).to(state.point)
        # The gradient step is affine, so its value at the extrapolated point is the extrapolation of its values.
        point = torch.lerp(state.last_point, state.point, ahead, out=state.last_point)
        weight = problem.penalty.prox(point, state.descent.step)
        count = state.count + 1
        if self.restart and count % RESTART_EVERY == 0:
            momentum = torch.where(_overshot(state, weight, ahead), 1.0, momentum)
        # A penalty may return its argument, which must not be overwritten while it is read.
        room = torch.empty_like(point) if weight.data_ptr() == point.data_ptr() else point
        return replace(
            state,
            weight=weight,
            point=state.descent.at(weight, room),
            last_weight=state.weight,
            last_point=state.point,
            momentum=momentum,
            count=count,
        )

    def step(self, problem: PenalisedLeastSquares, state: FistaState) -> FistaState:
        iterates, monitor = self._move(problem, state.iterates), state.monitor
        if iterates.count >= monitor.next_check:
            monitor = monitor.after(problem, iterates.weight, iterates.count, self.tolerance)
        return FistaState(iterates, monitor)


def _overshot(state: "Iterates", weight: Tensor, ahead: Float[Tensor, ""]) -> Bool[Tensor, ""]:
    """Return whether <Y - V_(k+1), V_(k+1) - V_k> > 0 in the metric of the step: the momentum points uphill."""
    back = torch.lerp(state.last_weight, state.weight, ahead).sub_(weight)
    step, product = state.descent.step, back.mul_(weight - state.weight)
    return (product / step if step.ndim == 2 else product.sum(0) / step).sum() > 0
