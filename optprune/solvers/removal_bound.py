"""A lower bound for structured problems: what the cheapest units must cost at least, whatever goes with them."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from optprune.numerics import linalg
from optprune.problems import StructuredProblem
from optprune.solvers.base import Answer, DirectSolver
from optprune.solvers.inverse import InverseForm, half_trace, unit_blocks
from optprune.solvers.solution import Certificate

SHARPNESS = 1000.0
"""how much less an eigenvector counts as leading whose eigenvalue is smaller by some share: e^-1 at a thousandth"""
LONGEST = 0.1
"""the most that a step changes log y of a unit by"""


@final
@dataclass(frozen=True)
class RemovalBound(DirectSolver[StructuredProblem]):
    r"""A lower bound on min f over the choices, from a relaxation; a feasible start is returned as it came.

    Dropping the units P costs, by duality, the largest value over multipliers Y of

        sum_{g in P} <Y_g, V0_g> - 1/2 sum_{g, h in P} Q_gh,   Q_gh = sum_{c in g, d in h} (A^-1)_cd <Y_c, Y_d>,

    so one Y for all P gives a lower bound. Y_g = t_g V0_g (A^-1_gg)^-1 makes <Y_g, V0_g> = 2 t_g s_g and Q_gg = 2 t_g^2
    s_g with s_g the exact cost of dropping g alone. Where Q of t = 1 is at most diag(2 s_g lambda / y_g), t_g = y_g /
    lambda leaves

        min f >= f(V0) + 1 / lambda  min_P sum_{g in P} y_g s_g,

    and the inner minimum is a projection. y_g = min(1, s / s_g), with s the dearest of the cheapest P, changes nothing
    about that minimum, and lambda, the largest eigenvalue of Q scaled to the diagonal y, is then that of the units
    which could go: those that will not, however much they are coupled, hardly count. From there a few supergradient
    steps in log y: up by a unit's share of the minimum, down by its share of the leading eigenvectors. Every y gives a
    bound, and the highest stands. Columns of W that point in
    different directions make Q nearly diagonal even where inputs are correlated: that is why this bound says something
    where a split of A does not. Where A is singular
    it proves 0. Accepts structured and linked problems. Cost: in^3 + out in^2 + steps units^3, in float64.
    """

    steps: int = 4
    """the steps in log y"""

    accepts = (StructuredProblem,)

    def monotone(self, problem: StructuredProblem) -> bool:
        return True

    def answer(self, problem: StructuredProblem, start: Tensor) -> Answer:
        certificate = Certificate(_bound(problem, self.steps), "dual of the removal of units, one multiplier each")
        return Answer(problem.within_support(start), certificate)


def _bound(problem: StructuredProblem, steps: int) -> float:
    loss, channels = problem.loss, problem.channels
    form = InverseForm.of(loss)
    if form.notes:
        # The inverse is that of another matrix. No loss is negative.
        return 0.0
    (units, each), flat = channels.columns.shape, channels.columns.reshape(-1)
    inverse, weight = form.inverse[flat[:, None], flat], form.minimiser[:, flat]
    blocks, grams = unit_blocks(inverse, weight, each)
    alone = half_trace(blocks, grams)
    parts = linalg.solve(blocks, weight.T.reshape(units, each, -1))
    multiplier = parts.reshape(units * each, -1)
    coupling = (inverse * (multiplier @ multiplier.T)).reshape(units, each, units, each).sum((1, 3))
    root = torch.where(alone > 0, 2 * alone, 1.0).rsqrt()
    rise = _rise(problem, alone, coupling * torch.outer(root, root), steps)
    # The inverse is known to about this share of itself, and V0 up to its residual.
    known = 1 - 8 * torch.finfo(torch.float64).eps * float(
        loss.gram.double().diagonal().sum() * form.inverse.diagonal().sum()
    )
    residual = loss.exact_gradient(form.minimiser)
    base = loss.exact_value(form.minimiser) - float(((residual @ form.inverse) * residual).sum()) / 2
    return max(base + max(known, 0.0) * rise, 0.0)


def _rise(problem: StructuredProblem, alone: Tensor, coupling: Tensor, steps: int) -> float:
    """The highest sum over the cheapest P of y_g s_g / lambda, of the y that are tried.

    `alone` [units] is s, and `coupling` [units, units] is Q of t = 1, scaled by 1 / sqrt(2 s_g 2 s_h).
    """
    # A GPU is waited for once, at the end.
    dearest = torch.where(problem.pattern.project(alone), 0.0, alone).amax()
    share = torch.where(alone > 0, torch.minimum(alone, dearest) / alone, 1.0)
    rounding, least = 1 + len(alone) * torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    best = torch.zeros_like(dearest)
    for step in range(steps + 1):
        root, value = share.sqrt(), share * alone
        sizes, vectors = linalg.eigh(coupling * torch.outer(root, root))
        largest = sizes[-1].clamp(min=least)
        gone = torch.where(problem.pattern.project(value), 0.0, value)
        total = gone.sum()
        best = torch.maximum(best, total / (largest * rounding))
        if step < steps:
            leading = vectors.square() @ (SHARPNESS * (sizes / largest - 1)).exp()
            slope = gone / total.clamp(min=least) - leading / leading.sum().clamp(min=least)
            share = share * (LONGEST * slope / slope.abs().amax().clamp(min=least)).exp()
    return float(best)
