"""L-BFGS on all kept weights of a block, in units of their own sizes."""

from dataclasses import dataclass, replace
from typing import final

import torch

from optprune.problems.matching import BlockMatching, Point
from optprune.solvers.base import Status
from optprune.solvers.descent import GRADIENT_PASSES, NUMBER, Descent
from optprune.work import Work, sweeps

DECREASE = 1e-4
"""the share of the decrease predicted by the slope that a step must gain (Armijo)"""
SHORTEST = 2.0**-30
"""the shortest step tried, relative to the one that the curvature suggests"""


@dataclass(frozen=True, eq=False)
class LbfgsState:
    """The parameters, the objective with its gradient in units, and the last pairs of moves and gradient changes."""

    point: Point
    value: float
    slope: Point
    first: float
    """the norm of the gradient at the start"""
    pairs: tuple[tuple[Point, Point], ...] = ()
    steps: int = 0
    stalled: bool = False


@final
@dataclass(frozen=True)
class Lbfgs(Descent[LbfgsState]):
    """v <- v - t u H u g, with H the inverse Hessian that the last `pairs` of moves and gradient changes suggest.

    In units u of each tensor's root mean square, on all examples in every step; t is halved from 1 until the objective
    falls by a ten-thousandth of the decrease predicted by the slope (Armijo). Each step costs one gradient or a few.
    Ends where the gradient is `tolerance` of the first one. Memory: 2 `pairs` + 4 numbers per kept entry.

    Reference: Liu and Nocedal (1989); Nocedal and Wright, Numerical Optimization, algorithm 7.4.
    """

    epochs: int = 20
    """the most steps, each of which uses all examples"""
    pairs: int = 8
    tolerance: float = 1e-6

    def work(self, weights: int, draws: int = 1) -> Work:
        # A direction reads all pairs twice; then come the direction, a point, its gradient and a pair.
        flops = self.epochs * sweeps(8 * self.pairs + 10, weights)
        return Work(flops, (2 * self.pairs + 5) * NUMBER * weights, self.epochs * GRADIENT_PASSES)

    def begin(self, problem: BlockMatching) -> LbfgsState:
        start = problem.point()
        value, slope = self._measured(problem, start)
        return LbfgsState(start, value, slope, _norm(slope))

    def step(self, problem: BlockMatching, state: LbfgsState) -> LbfgsState:
        direction = self._direction(state, sum(one.count for one in problem.entries))
        promise = _dot(direction, state.slope)
        length, units = 1.0, problem.units
        while length >= SHORTEST:
            point = tuple(
                weight - length * unit * part for weight, unit, part in zip(state.point, units, direction, strict=True)
            )
            value, slope = self._measured(problem, point)
            if value <= state.value - DECREASE * length * promise:
                break
            length /= 2
        else:
            problem.put(state.point)
            return replace(state, steps=state.steps + 1, stalled=True)
        pairs = state.pairs
        move = tuple(-length * part for part in direction)
        change = tuple(new - old for new, old in zip(slope, state.slope, strict=True))
        # A pair without positive curvature would make H indefinite.
        if _dot(move, change) > torch.finfo(point[0].dtype).eps * _norm(move) * _norm(change):
            pairs = (*pairs, (move, change))[-self.pairs :]
        return replace(state, point=point, value=value, slope=slope, pairs=pairs, steps=state.steps + 1)

    def _direction(self, state: LbfgsState, count: int) -> Point:
        """Return H g, of `count` entries, by the two-loop recursion over the pairs."""
        direction, factors = list(state.slope), list[float]()
        for move, change in reversed(state.pairs):
            factors.append(_dot(move, direction) / _dot(move, change))
            direction = [part - factors[-1] * other for part, other in zip(direction, change, strict=True)]
        # Without a pair the first step moves the weights by a hundredth of their root mean square.
        scale = 0.01 * count**0.5 / (_norm(direction) or 1.0)
        if state.pairs:
            move, change = state.pairs[-1]
            scale = _dot(move, change) / _dot(change, change)
        direction = [scale * part for part in direction]
        for (move, change), factor in zip(state.pairs, reversed(factors), strict=True):
            more = factor - _dot(change, direction) / _dot(move, change)
            direction = [part + more * other for part, other in zip(direction, move, strict=True)]
        return tuple(direction)

    def _measured(self, problem: BlockMatching, point: Point) -> tuple[float, Point]:
        value, slope = problem.gradient(point)
        return value, tuple(part.mul_(unit) for part, unit in zip(slope, problem.units, strict=True))

    def done(self, problem: BlockMatching, state: LbfgsState) -> Status | None:
        if _norm(state.slope) <= self.tolerance * state.first:
            return Status.CONVERGED
        if state.stalled:
            return Status.STALLED
        return Status.STEP_LIMIT if state.steps >= self.epochs else None

    def evaluate_every(self, problem: BlockMatching) -> int:
        return 1


def _dot(one: Point | list[torch.Tensor], other: Point | list[torch.Tensor]) -> float:
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(one, other, strict=True))


def _norm(point: Point | list[torch.Tensor]) -> float:
    return _dot(point, point) ** 0.5
