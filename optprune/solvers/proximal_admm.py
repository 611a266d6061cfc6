"""ADMM for any penalty: the loss in closed form by one factorisation, the penalty by its proximal operator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import NumericalError
from optprune.metric import OutputMetric
from optprune.numerics import linalg
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers.base import Solver, check_options, measuring, unfitted
from optprune.solvers.duality import GapMonitor, StopsAtGap, gap_flops
from optprune.work import DOUBLE, Work, eigenvectors, inverse, product, sweeps

BALANCE = 5.0
"""the ratio of the two relative residuals above which rho is changed"""
FASTEST = 10.0
"""the largest factor of rho in one change"""
CLEAR = 1e3
"""the factor of rho above the least one that makes A + R definite"""
LARGEST_RHO = 1e15
"""the limit of rho, beyond which steps vanish in float64"""
MOST_CHANGES = 10
"""the most changes of rho in a solve: with endless changes it may not converge"""
STEPS_PER_DIGIT = 8
"""the steps per decimal digit of the gap, on layers like those of SmolLM2; twice as many under a full metric"""


@dataclass(frozen=True, eq=False)
class Resolvent(ABC):
    """The map V -> argmin_X f(X) + |X - V|_R^2 / 2, and R = rho d, d the diagonal of A (under a metric of S (x) A)."""

    rho: float
    weights: Float[Tensor, "*shape"]
    """R for every column, [in]; for every weight, [out, in]; or one for all, []"""

    @abstractmethod
    def solved(self, right: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the X with S X A + R X = right."""


@dataclass(frozen=True, eq=False)
class ByInverse(Resolvent):
    """The resolvent without a metric, by the inverse of A + diag(R): one product per step."""

    inverse: Float[Tensor, "in in"]

    @classmethod
    def of(cls, loss: LayerLoss, rho: float, *, by_column: bool) -> "ByInverse":
        """Return the resolvent by Cholesky in float64: the scaled A + R has a condition of at most 1 + in / rho.

        Where A + R is indefinite, by the rounding of the moments, rho is raised to CLEAR times the least value that
        makes it definite.
        """
        scale = _scale(loss.gram.diagonal(), by_column)
        matrix = loss.gram.double() / torch.outer(scale, scale)
        matrix.diagonal().add_(rho)
        factor, failed = linalg.try_cholesky(matrix)
        if bool(failed):
            rho, before = CLEAR * _definite(matrix, rho), rho
            matrix.diagonal().add_(rho - before)
            factor, failed = linalg.try_cholesky(matrix)
        if bool(failed):
            raise NumericalError("the Gram matrix is indefinite: collect it again, or raise the damping")
        inverse = torch.cholesky_inverse(factor) / torch.outer(scale, scale)
        return cls(rho, _coupling(rho * scale.square(), by_column).to(loss.gram), inverse.to(loss.gram))

    def solved(self, right: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return right @ self.inverse


@dataclass(frozen=True, eq=False)
class ByEigenvectors(Resolvent):
    """The resolvent with a metric, which couples the outputs, by eigenvectors of S and A: four products per step."""

    rows: Float[Tensor, "out out"]
    columns: Float[Tensor, "in in"]
    values: Float[Tensor, "out in"]
    """the eigenvalues of S (x) A, scaled to a unit diagonal, plus rho"""

    @classmethod
    def of(cls, loss: LayerLoss, metric: OutputMetric, rho: float, *, by_column: bool) -> "ByEigenvectors":
        """Return the resolvent, in float64 by two eigendecompositions."""
        outputs, high, rows = _spectrum(metric.matrix, by_column)
        inputs, wide, columns = _spectrum(loss.gram, by_column)
        weights = _coupling(rho * torch.outer(outputs, inputs).square(), by_column)
        values, gram = torch.outer(high, wide) + rho, loss.gram
        return cls(rho, weights.to(gram), rows.to(gram), columns.to(gram), values.to(gram))

    def solved(self, right: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        inside = (self.rows.T @ right @ self.columns).div_(self.values)
        return self.rows @ inside @ self.columns.T


@dataclass(frozen=True, eq=False)
class AdmmState:
    """The weight at which the penalty is measured, the scaled dual variable, and the gap."""

    resolvent: Resolvent
    weight: Float[Tensor, "out in"]
    """Z, a value of the proximal operator"""
    dual: Float[Tensor, "out in"]
    """U: R U is a subgradient of P at Z"""
    count: int
    changes: int
    """the number of changes of rho"""
    monitor: GapMonitor


@final
@dataclass(frozen=True)
class ProximalAdmm(StopsAtGap, Solver[PenalisedLeastSquares, AdmmState]):
    r"""Minimise f(V) + P(V) by the alternating direction method of multipliers, over-relaxed.

        X = argmin f(X) + |X - Z + U|_R^2 / 2,   Y = relaxation X + (1 - relaxation) Z,
        Z = prox_(P / R)(Y + U),   U = Y + U - Z

    with R = rho diag(A), or rho times its mean where the penalty is not separable. All rows share one inverse of A + R,
    so that a step is one product [out, in] x [in, in], as in FISTA, and needs far fewer steps where A is ill
    conditioned. R U is a subgradient of P at every step: its bound is as near to the optimum as Z is, while that of a
    gradient is off by the square root of that distance. rho is changed, at a check, where the residuals X - Z and
    Z - (the Z before) differ much in their relative sizes. Under an output metric S a step is four products, with the
    eigenvectors of S and of A.

    Accepts penalised least squares with any penalty. Stops when the relative duality gap is at most `tolerance`,
    measured in float64 at steps that lie further and further apart; returns the best Z seen at a check, or the start
    where that is better. Memory 6 out in + 3 in^2.
    Reference: Boyd, Parikh, Chu, Peleato and Eckstein (2011), sections 3.4 and 6.4; Eckstein and Bertsekas (1992) for
    over-relaxation; Wohlberg (arXiv 1704.06209) for relative residuals.
    """

    tolerance: float = 1e-6
    rho: float = 0.2
    relaxation: float = 1.6

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        steps = STEPS_PER_DIGIT * max(1.0, -math.log10(self.tolerance))
        step = product(outputs, inputs, inputs) + sweeps(15, outputs, inputs)
        once = inverse(inputs)
        if coupled:
            steps *= 2
            step += product(outputs, inputs, inputs) + 2 * product(outputs, outputs, inputs)
            once = DOUBLE * (eigenvectors(inputs) + eigenvectors(outputs))
        once += measuring(outputs, inputs, coupled=coupled) + gap_flops(outputs, inputs, steps, coupled=coupled)
        return Work(once + steps * step, unfitted(outputs, inputs, coupled=coupled))

    def init(self, problem: PenalisedLeastSquares, start: Tensor) -> AdmmState:
        resolvent = _resolvent(problem, self.rho)
        return AdmmState(resolvent, start, torch.zeros_like(start), 0, 0, GapMonitor.of(problem, start))

    def step(self, problem: PenalisedLeastSquares, state: AdmmState) -> AdmmState:
        coupling, before = state.resolvent.weights, state.weight
        solved = state.resolvent.solved(problem.loss.linear + coupling * (before - state.dual))
        point = torch.lerp(before, solved, self.relaxation).add_(state.dual)
        weight = problem.penalty.prox(point, 1 / coupling)
        after = replace(state, weight=weight, dual=point - weight, count=state.count + 1)
        if after.count < state.monitor.next_check:
            return after
        monitor = state.monitor.after(problem, weight, after.count, self.tolerance, coupling * after.dual)
        return self._balanced(problem, replace(after, monitor=monitor), solved, before)

    def _balanced(self, problem: PenalisedLeastSquares, state: AdmmState, solved: Tensor, before: Tensor) -> AdmmState:
        """Return the state with another rho where X - Z over Z and Z - (the previous Z) over U differ much in size."""
        weights, weight = state.resolvent.weights, state.weight
        terms = (solved - weight, weight - before, weight, state.dual)
        # In float64: squares of extreme sizes leave the range of float32.
        exact = weights.double()
        primal, dual, size, pull = linalg.numbers(*((exact * term.double().square()).sum() for term in terms))
        # Multiplied by both sizes: one of these is zero where rho is so small or so large that steps vanish.
        apart = math.sqrt(primal * pull), math.sqrt(dual * size)
        if state.changes == MOST_CHANGES or apart == (0, 0) or not all(map(math.isfinite, apart)):
            return state
        ratio = apart[0] / apart[1] if apart[1] else math.inf
        if 1 / BALANCE <= ratio <= BALANCE:
            return state
        factor = min(max(math.sqrt(ratio), 1 / FASTEST), FASTEST)
        resolvent = _resolvent(problem, state.resolvent.rho * factor)
        # R U is a subgradient of the penalty, whatever R.
        dual = state.dual * (state.resolvent.rho / resolvent.rho)
        return replace(state, resolvent=resolvent, dual=dual, changes=state.changes + 1)


def _definite(matrix: Float[Tensor, "n n"], rho: float) -> float:
    """Return about the least rho with which A + rho I is definite, for a matrix that includes a rho already."""
    larger = rho
    while larger < LARGEST_RHO:
        larger *= FASTEST
        shifted = matrix.clone()
        shifted.diagonal().add_(larger - rho)
        if not bool(linalg.try_cholesky(shifted)[1]):
            break
    return larger


def _resolvent(problem: PenalisedLeastSquares, rho: float) -> Resolvent:
    loss, by_column = problem.loss, problem.penalty.separable
    if loss.metric is None:
        return ByInverse.of(loss, rho, by_column=by_column)
    return ByEigenvectors.of(loss, loss.metric, rho, by_column=by_column)


def _spectrum(
    matrix: Float[Tensor, "n n"], by_column: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return the scale of a matrix, its eigenvalues in these units, and its eigenvectors over the scale."""
    scale = _scale(matrix.diagonal(), by_column)
    values, vectors = linalg.eigh(matrix.double() / torch.outer(scale, scale))
    return scale, values.clamp(min=0), vectors / scale[:, None]


def _scale(diagonal: Float[Tensor, " n"], each: bool) -> Float[Tensor, " n"]:
    """Return the roots of the diagonal, or of its mean; a zero on the diagonal is replaced by the mean."""
    exact = diagonal.double()
    mean = exact.mean()
    mean = torch.where(mean > 0, mean, 1.0)
    return torch.where(exact > 0, exact, mean).sqrt() if each else mean.sqrt().expand(exact.shape).clone()


def _coupling(weights: Float[Tensor, "*shape"], by_column: bool) -> Tensor:
    """Return R; a scalar where it is the same for all, because every penalty accepts a scalar step."""
    return weights if by_column else weights.flatten()[0]
