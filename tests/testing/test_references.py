"""Optima of tiny problems against plain enumerations, by the normal equations of every choice."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from optprune.grids import Grid
from optprune.metric import OutputMetric
from optprune.patterns import NM, Pattern, RowWise, Unstructured
from optprune.problems import GridLeastSquares, SparseLeastSquares
from optprune.testing.references import reference
from tests.helpers.sparse_cases import correlated_loss


def kept(pattern: Pattern, places: tuple[int, ...]) -> bool:
    """Whether four of the entries of a [2, 4] weight obey a pattern that keeps half of it."""
    return isinstance(pattern, Unstructured) or sum(place < 4 for place in places) == 2


@pytest.mark.parametrize("pattern", [Unstructured(4), RowWise(2), NM(2, 4)], ids=["unstructured", "rows", "2:4"])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_best_mask_of_a_pattern_is_found(coupled: bool, pattern: Pattern) -> None:
    loss = correlated_loss(0, 2, 4)
    gradients = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients[:, 1] += 2 * gradients[:, 0]
    metric = OutputMetric.from_samples(gradients)
    loss = replace(loss, metric=metric) if coupled else loss
    outputs = metric.matrix if coupled else torch.eye(2, dtype=torch.float64)
    system, right = torch.kron(outputs, loss.gram), (outputs @ loss.weight @ loss.gram).reshape(-1)
    gains = []
    for places in combinations(range(8), 4):
        if kept(pattern, places):
            own = list(places)
            gains.append(float(right[own] @ torch.linalg.solve(system[own][:, own], right[own])) / 2)
    expected = float(right @ loss.weight.reshape(-1)) / 2 - max(gains)
    assert reference(SparseLeastSquares(loss, pattern)).optimum == pytest.approx(expected, rel=1e-9)


def test_the_optimum_on_a_grid_is_that_of_scales_of_any_precision() -> None:
    """That of the best stored scales is above it, by the rounding of a float16."""
    loss = correlated_loss(0, 3, 4)
    integers = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.float64)[:, None]
    integers = integers[(integers != 0).any(2)]
    curvature = ((integers @ loss.gram) * integers).sum(1)
    gains = (integers @ loss.gram @ loss.weight.T).square() / curvature[:, None] / 2
    whole = float(((loss.weight @ loss.gram) * loss.weight).sum()) / 2
    best = reference(GridLeastSquares(loss, Grid(2, 4)))
    assert best.optimum == pytest.approx(whole - float(gains.max(0).values.sum()), rel=1e-9)
    assert best.weight is not None
    assert float(loss.value(torch.from_numpy(best.weight))) > best.optimum * (1 + 1e-9)
