"""The cost of removing one weight or one unit is the exact rise of the loss, with everything else refitted."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.errors import NumericalError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, MaskedLeastSquares
from optprune.solvers import Restore, solve
from optprune.solvers.inverse import entry_costs, unit_costs
from optprune.testing.strategies import METRIC_KINDS, losses, metrics
from tests.helpers.faults import noticed


@st.composite
def regular_losses(draw, kinds=METRIC_KINDS):
    loss = draw(losses(generic=True, width=4)).damped(0.1)
    return replace(loss, metric=draw(metrics(loss.weight.shape[0], draw(st.sampled_from(kinds)))))


def optimum(loss, mask):
    return solve(MaskedLeastSquares(loss, mask), Restore()).objective


@settings(max_examples=20)
@given(regular_losses(("none", "diagonal")))
def test_the_cost_of_an_entry_is_the_rise_with_its_row_refitted(loss):
    rows, width = loss.weight.shape
    least, costs = optimum(loss, torch.ones(1, width, dtype=torch.bool)), entry_costs(loss)
    assert costs.shape == (rows, width)
    for row in range(rows):
        for column in range(width):
            mask = torch.ones(rows, width, dtype=torch.bool)
            mask[row, column] = False
            rise = optimum(loss, mask) - least
            assert float(costs[row, column]) == pytest.approx(rise, rel=1e-6, abs=1e-9 * loss.constant)


@settings(max_examples=20)
@given(regular_losses(("full",)))
def test_under_couplings_the_cost_of_an_entry_is_that_of_its_row_alone(loss):
    exact = entry_costs(replace(loss, metric=loss.metric.only_diagonal()))
    assert torch.allclose(entry_costs(loss), exact, rtol=1e-12)


@settings(max_examples=30)
@given(regular_losses(), st.permutations(range(4)))
def test_the_cost_of_a_unit_is_the_rise_with_everything_refitted(loss, order):
    columns = torch.tensor(order).reshape(2, 2)
    channels = Channels(columns, torch.zeros(2, dtype=torch.long))
    least, costs = optimum(loss, torch.ones(1, 4, dtype=torch.bool)), unit_costs(loss, channels)
    for unit in range(2):
        mask = torch.ones(1, 4, dtype=torch.bool)
        mask[:, columns[unit]] = False
        rise = optimum(loss, mask) - least
        assert float(costs[unit]) == pytest.approx(rise, rel=1e-6, abs=1e-9 * loss.constant)


def test_costs_are_in_the_dtype_of_the_weight():
    moments = InputMoments.from_samples(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    loss = LayerLoss.of(torch.ones(2, 3), moments, metric=OutputMetric.from_samples(torch.eye(2)))
    assert entry_costs(loss).dtype == torch.float32


def test_a_singular_gram_is_an_error():
    loss = LayerLoss.of(torch.ones(2, 3), InputMoments.from_samples(torch.ones(1, 3)))
    with pytest.raises(NumericalError, match="damp"):
        entry_costs(loss)


# -- faults planted


def no_refit(loss):
    costs = loss.weight.square() * loss.gram.diagonal() / 2
    return costs if loss.metric is None else loss.metric.diagonal[:, None] * costs


def test_a_cost_without_the_refit_is_noticed(monkeypatch):
    check = test_the_cost_of_an_entry_is_the_rise_with_its_row_refitted
    noticed(monkeypatch, sys.modules[__name__], "entry_costs", no_refit, check)
