"""Penalised least squares that is hard: an ill-conditioned Gram matrix, and every penalty."""

import pytest
import torch

from optprune.moments import InputMoments
from optprune.penalties import L1, ColumnGroups, ElasticNet, WeightedL1
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers import Status, solve
from optprune.testing import reference
from optprune.testing.quadratic import rounding
from optprune.testing.references import PENALISED_ACCURACY

WIDTH, ROWS, TOKENS = 12, 3, 60
MOST_STEPS = 200_000


def ill_conditioned(seed, *, dense):
    """A loss whose Gram matrix has condition 1e8, of a weight [3, 12]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(TOKENS, WIDTH))[0], torch.linalg.qr(normal(WIDTH, WIDTH))[0]
    inputs = TOKENS**0.5 * left * torch.logspace(0, -4, WIDTH, dtype=torch.float64) @ right.T
    ideal = inputs + 0.1 * normal(TOKENS, WIDTH) if dense else None
    return LayerLoss.of(normal(ROWS, WIDTH), InputMoments.from_samples(inputs, ideal))


def penalty_of(kind, loss, share):
    largest = float(loss.target.abs().max())
    spread = torch.rand(loss.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread[0, ::4] = 0
    return {
        "l1": L1(share * largest),
        "weighted l1": WeightedL1(share * largest * spread),
        "elastic net": ElasticNet(share * largest, share * float(loss.gram.diagonal().mean())),
        "elastic net without ridge": ElasticNet(share * largest, 0.0),
        "column groups": ColumnGroups(share * float(loss.target.norm(dim=0).max())),
    }[kind]


PENALTY_NAMES = ("l1", "weighted l1", "elastic net", "elastic net without ridge", "column groups")


def assert_reaches_the_optimum(solver, kind, share, dense):
    """On a Gram matrix of condition 1e8 the solver is within what it promises of a reference, and proves it."""
    loss = ill_conditioned(1, dense=dense)
    values = torch.linalg.eigvalsh(loss.gram)
    assert float(values[-1] / values[0]) == pytest.approx(1e8, rel=1e-3)
    problem = PenalisedLeastSquares(loss, penalty_of(kind, loss, share))
    solution, best = solve(problem, solver, max_steps=MOST_STEPS), reference(problem)
    # The promise of 1e-6, plus the accuracy of the reference and the rounding of the loss on both sides.
    slack = PENALISED_ACCURACY * best.optimum + best.rounding + rounding(loss, solution.value)
    assert solution.objective <= best.optimum * (1 + 1e-6) + slack
    assert solution.certificate.lower_bound <= best.optimum + slack
    assert solution.objective - solution.certificate.lower_bound <= 1e-6 * solution.objective + slack
    assert solution.status is Status.CONVERGED
