"""SparseGPT against the literal column-by-column method."""

import importlib
from functools import partial

import pytest
import torch

from optprune.errors import NumericalError
from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import (
    SparseGpt,
    solve,
)
from tests.helpers.faults import noticed
from tests.helpers.literal_choice import literal_choice
from tests.helpers.sparse_cases import PATTERN_NAMES, by_pattern, correlated


def literal_sparsegpt(problem, block):
    """Column by column; each removal is one optimal-brain-surgeon update of the columns that are not frozen yet."""
    loss, pattern = problem.loss, problem.pattern
    gram, (rows, width) = loss.gram, loss.weight.shape
    value = torch.linalg.solve(gram, loss.target.T).T
    dropped = torch.zeros(rows, width, dtype=torch.bool)
    size = block // pattern.m * pattern.m if isinstance(pattern, NM) else block
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(width)]
    saliency = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(width):
        first = j // size * size
        last = min(first + size, width)
        if isinstance(pattern, NM):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                dropped[:, group] = ~literal_choice(value[:, group] ** 2 / saliency[group], RowWise(pattern.n))
        elif j == first:
            keep = pattern.keep * last // width - pattern.keep * first // width
            part = slice(first, last)
            dropped[:, part] = ~literal_choice(value[:, part] ** 2 / saliency[part], type(pattern)(keep))
        for i in range(rows):
            if dropped[i, j]:
                value[i, j:] -= value[i, j] / inverses[j][0, 0] * inverses[j][0]
                value[i, j] = 0.0
    return value


@pytest.mark.parametrize("block", [4, 7, 128])
@pytest.mark.parametrize("seed", range(4))
@by_pattern
def test_sparsegpt_is_the_literal_column_by_column_method(pattern, seed, block):
    problem = correlated(seed, 5, 12, pattern)
    value = solve(problem, SparseGpt(block)).value
    # A condition of a few thousand leaves ten digits and more.
    assert torch.allclose(value, literal_sparsegpt(problem, block), rtol=1e-8, atol=1e-9)


@by_pattern
def test_sparsegpt_compensation_pays(pattern):
    """On a fixed set of 20 instances its answer is better than the same mask without any update of the weights."""
    for seed in range(0, 20, 2):
        problem = correlated(seed, 8, 16, pattern)
        value = solve(problem, SparseGpt()).value
        plain = torch.where(value != 0, problem.loss.weight, 0.0)
        assert problem.objective(value) < problem.objective(plain)


def test_sparsegpt_refuses_a_singular_gram_and_says_what_to_do():
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = LayerLoss.of(torch.ones(2, 6), InputMoments.from_samples(inputs))
    with pytest.raises(NumericalError, match="damp the loss"):
        solve(SparseLeastSquares(loss, RowWise(3)), SparseGpt())
    assert solve(SparseLeastSquares(loss.damped(0.01), RowWise(3)), SparseGpt()).violation == 0


# -- faults planted: heuristics promise little to the laws, so these tests must notice

sparsegpt = importlib.import_module("optprune.solvers.sparsegpt")
inverse_gram = sparsegpt.inverse_gram


def uncompensated(loss):
    inverse, weight = inverse_gram(loss)
    return torch.diag(inverse.diagonal()), weight


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_missing_compensation_is_noticed(pattern, monkeypatch):
    check = partial(test_sparsegpt_is_the_literal_column_by_column_method, pattern, 0, 128)
    noticed(monkeypatch, sparsegpt, "inverse_gram", uncompensated, check)
