"""Adam on all kept weights of a block, in units of their own sizes, with a warm-up and a cosine to zero."""

import math
from dataclasses import dataclass
from typing import final

import torch

from optprune.problems.matching import BlockMatching, Point
from optprune.solvers.base import Status
from optprune.solvers.descent import GRADIENT_PASSES, NUMBER, Descent
from optprune.work import Work, sweeps

TINY = 1e-12
"""a gradient far below this, in units of the problem and of its weights, may be rounding and has no effect"""
RATE_DECAY = 1 / 3
"""the factor of the rate when the descent returns to its best point"""


@dataclass(eq=False)
class AdamState:
    """The running averages of the gradients; steps change the tensors in place, and the block holds the point."""

    mean: Point
    square: Point
    steps: int = 0
    since_restart: int = 0
    """the steps since the average of the gradients was last set to zero"""
    rate_scale: float = 1.0
    """the factor of the rate"""


@final
@dataclass(frozen=True)
class Adam(Descent[AdamState]):
    """v <- v - rate_k u m_k / sqrt(s_k), with averages m of the gradient u g and s of its square, made unbiased.

    u is the root mean square of each tensor's kept entries, so the rate is the relative size of a weight's
    change in a step, for every layer. The rate grows over the first tenth of the steps, then goes to zero along a
    cosine. A step uses one draw of the examples, for `epochs` epochs; the held-out examples are
    evaluated after each epoch. Where their error did not fall, the descent returns to the best point, with a third
    of the rate. Memory: two numbers per kept entry, beside the gradient.

    Reference: Kingma and Ba (2015).
    """

    epochs: int = 8
    """the number of passes over all examples"""
    rate: float = 0.003
    """about the largest change of a weight in a step, relative to the root mean square of its tensor"""
    memory: tuple[float, float] = (0.9, 0.95)
    """the decay of the averages of the gradient and of its square"""
    warm: float = 0.1
    """the share of the steps over which the rate grows"""

    def work(self, weights: int, draws: int = 1) -> Work:
        passes = self.epochs * GRADIENT_PASSES
        return Work(self.epochs * draws * sweeps(10, weights), 2 * NUMBER * weights, passes)

    def begin(self, problem: BlockMatching) -> AdamState:
        mean, square = (tuple(one.zeros() for one in problem.entries) for _ in range(2))
        return AdamState(mean, square)

    def step(self, problem: BlockMatching, state: AdamState) -> AdamState:
        _, gradient = problem.gradient(draw=state.steps)
        rate, (first, second) = state.rate_scale * self.rate_at(state.steps, self._steps(problem)), self.memory
        state.steps, state.since_restart = state.steps + 1, state.since_restart + 1
        scale, spread = 1 - first**state.since_restart, 1 - second**state.steps
        for one, mean, square, slope, unit in zip(
            problem.entries, state.mean, state.square, gradient, problem.units, strict=True
        ):
            slope.mul_(unit)
            mean.lerp_(slope, 1 - first)
            square.mul_(second).addcmul_(slope, slope, value=1 - second)
            roots = torch.div(square, spread, out=slope).sqrt_().add_(TINY)
            one.write(one.read().addcdiv_(mean, roots, value=-rate * unit / scale))
        return state

    def rate_at(self, step: int, steps: int) -> float:
        """Return the rate of a step, of `steps` in all."""
        warm = max(1, round(self.warm * steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (1 + math.cos(math.pi * (step + 1 - warm) / (steps + 1 - warm))) / 2

    def restart(self, problem: BlockMatching, state: AdamState, best: Point) -> AdamState:
        problem.put(best)
        for mean in state.mean:
            mean.zero_()
        state.since_restart, state.rate_scale = 0, state.rate_scale * RATE_DECAY
        return state

    def done(self, problem: BlockMatching, state: AdamState) -> Status | None:
        return Status.CONVERGED if state.steps >= self._steps(problem) else None

    def evaluate_every(self, problem: BlockMatching) -> int:
        return problem.examples.draws

    def _steps(self, problem: BlockMatching) -> int:
        return self.epochs * problem.examples.draws
