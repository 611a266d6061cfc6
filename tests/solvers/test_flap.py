"""FLAP: variances of inputs, added up over the columns of a unit."""

import pytest
import torch

from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, StructuredLeastSquares
from optprune.solvers import (
    FaspMetric,
    FlapMetric,
    GreedyObs,
    solve,
)
from tests.helpers.faults import noticed
from tests.helpers.structured_cases import (
    grouped_query,
)


def test_flap_ranks_by_variance_and_a_bias_replaces_the_means():
    # The second input is large and constant, the first varies: without its mean only the first counts.
    inputs = torch.tensor([[1.0, 9.0], [-1.0, 9.0], [1.0, 9.0], [-1.0, 9.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for fit_bias, error in ((True, 0.0), (False, 18.0**2 / 2)):
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), fit_bias=fit_bias)
        problem = StructuredLeastSquares(loss, Channels.of(2), 1)
        solution = solve(problem, FlapMetric())
        assert solution.value.tolist() == [[1.0, 0.0]]
        assert solution.objective == pytest.approx(error)
        assert solve(problem, FaspMetric()).value.tolist() == [[0.0, 2.0]]
    assert loss.bias_change(solution.value).tolist() == [18.0]


def test_flap_adds_up_over_the_columns_of_a_unit():
    problem = grouped_query(0, "mixed")
    loss = problem.loss
    variance = loss.moments.gram.diagonal() - loss.moments.mean.square()
    score = (loss.weight.square().sum(0) * variance).square()[problem.channels.columns].sum(1)
    assert torch.equal(problem.support(solve(problem, FlapMetric()).value), problem.pattern.project(score))


def test_flap_squares_the_columns_of_a_head_before_it_adds_them_up():
    # Two heads whose columns fluctuate by 3 and 3, and by 5 and 0: 6 > 5, but 9 + 9 < 25 + 0.
    moments = InputMoments(torch.eye(4), torch.zeros(4), 50)
    weight = torch.tensor([[3.0, 3.0, 5.0, 0.0]]).sqrt()
    problem = StructuredLeastSquares(LayerLoss.of(weight, moments), Channels.of(4, 2), 1)
    assert solve(problem, FlapMetric()).value.nonzero()[:, 1].tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flap_ranks_by_variance_where_means_are_large(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=generator) * torch.linspace(0.05, 0.1, 12) + 100
    weight = torch.randn(4, 12, generator=generator)
    literal = weight.double().square().sum(0) * inputs.double().var(0)
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs.to(dtype)), 0.01, fit_bias=True)
    problem = StructuredLeastSquares(loss, Channels.of(12), 6)
    found = problem.support(solve(problem, FlapMetric()).value)
    assert found.nonzero()[:, 0].tolist() == literal.topk(6).indices.sort().values.tolist()
    assert solve(problem, GreedyObs()).violation == 0


# -- faults planted: heuristics promise little to the laws, so these tests must notice


def uncentred(self, problem):
    return problem.loss.weight.square() * problem.loss.moments.gram.diagonal()


def first_column_only(self, per_column):
    return per_column[self.columns][:, 0]


FAULTS = {
    "the mean square for the variance": (
        FlapMetric,
        "scores",
        uncentred,
        test_flap_ranks_by_variance_and_a_bias_replaces_the_means,
    ),
    "only the first column of a unit counts": (
        Channels,
        "sum_columns",
        first_column_only,
        test_flap_adds_up_over_the_columns_of_a_unit,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
