"""Default solvers on tiny problems against optima by exhaustion: how many end there, and how far the others are."""

import pytest
import torch

from optprune.moments import InputMoments
from optprune.patterns import NM, PartlyFixed, Pattern, RowLimits, RowWise
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import Admm, solve
from tests.helpers.tiny_instances import KINDS, METRICS, Draws, endings

MET, MOST = 0.9, 2.0
"""the least share at the optimum, and the largest ratio to it"""
COUNT, ROTATIONS = 70, 24
"""numbers of instances; a reference of rotations takes longer"""
WITHOUT_FIXED = torch.zeros(4, 4, dtype=torch.bool)
FIXED = torch.eye(4, dtype=torch.bool)
DEAD_CASES = {
    "limits of rows": RowLimits(12, 1, 4),
    "partly fixed": PartlyFixed(RowWise(3), WITHOUT_FIXED, WITHOUT_FIXED),
    "rows": RowWise(3),
    "3:4": NM(3, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nine_of_ten_end_at_the_optimum_and_none_above_twice_it(kind: str) -> None:
    found = endings(kind, ROTATIONS if kind == "rotation" else COUNT)
    assert sum(each.met for each in found) >= MET * len(found)
    assert max(each.ratio for each in found) <= MOST


@pytest.mark.parametrize("first", [10_003, 30_000, 50_070])
def test_rotations_of_other_instances_end_there_too(first: int) -> None:
    """The first of these ended 1,246 times above the optimum: its inputs are nearly dependent."""
    found = endings("rotation", 8, first)
    assert sum(each.met for each in found) >= MET * len(found)
    assert max(each.ratio for each in found) <= MOST


def with_a_dead_input(seed: int, metric: str) -> LayerLoss:
    """A loss without damping of 4 x 4 weights, of which an input is zero on all tokens and has the largest weights."""
    draws = Draws(seed)
    inputs, weight = draws.normal(20, 4), draws.normal(4, 4)
    dead = seed % 4
    inputs[:, dead] = 0
    weight[:, dead] = 10
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs))
    return draws.in_metric(loss, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pattern", DEAD_CASES.values(), ids=DEAD_CASES)
def test_weights_of_dead_inputs_are_not_kept_in_place_of_others(pattern: Pattern, metric: str) -> None:
    """Three of the four inputs of every row are alive, and three weights are kept: the loss can be zero."""
    for seed in range(6):
        problem = SparseLeastSquares(with_a_dead_input(seed, metric), pattern)
        for solver in (None, Admm()):
            kept = problem.support(solve(problem, solver).value)
            assert not bool(kept[:, seed % 4].any())
        assert solve(problem).objective <= 1e-12 * problem.loss.constant
