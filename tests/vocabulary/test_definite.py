"""What no tokens can have as their moments is refused once, where a loss is made, whoever would solve it."""

from dataclasses import replace

import pytest
import torch

import optprune.numerics.gram
from optprune.errors import NumericalError
from optprune.metric import OutputMetric
from optprune.moments import DenseMoments, InputMoments
from optprune.problems import LayerLoss

INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
UNEVEN = torch.tensor([[1.0, 0.5], [0.4, 1.0]])


def moments_of(matrix, mean=0.0):
    return InputMoments(matrix, torch.full_like(matrix[0], mean), 9)


def random_moments(tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=dtype)
    return inputs * torch.logspace(0, -3, width, dtype=dtype)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize(("matrix", "message"), [(INDEFINITE, "indefinite"), (UNEVEN, "not symmetric")])
def test_a_gram_matrix_that_no_tokens_can_have_is_refused(matrix, message, damping, scale):
    """Whatever the damping: moments that are not those of tokens say nothing about them."""
    with pytest.raises(NumericalError, match=f"Gram matrix is {message}.*collect it again"):
        LayerLoss.of(torch.ones(1, 2), moments_of(matrix.double() * scale), damping)


def test_a_small_input_does_not_hide_that_it_is_indefinite():
    unit = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    with pytest.raises(NumericalError, match="indefinite"):
        moments_of(INDEFINITE.double() * torch.outer(unit, unit)).check()


def test_moments_changed_after_they_were_collected_are_looked_at_again():
    moments = InputMoments.from_samples(torch.eye(2))
    with pytest.raises(NumericalError, match="indefinite"):
        replace(moments, covariance=INDEFINITE).check()
    metric = OutputMetric.from_samples(torch.eye(2))
    with pytest.raises(NumericalError, match="output metric is indefinite"):
        replace(metric, average=INDEFINITE).check()


def test_a_drift_that_no_tokens_can_have_is_refused():
    dense = DenseMoments(torch.eye(2), torch.eye(2) + 9 * INDEFINITE, torch.zeros(2))
    with pytest.raises(NumericalError, match=r"covariance of the drift.*indefinite"):
        InputMoments.from_averages(torch.eye(2), torch.zeros(2), 9, dense).check()


def test_a_mean_that_contradicts_the_gram_matrix_is_refused():
    inputs = random_moments(50, 8, torch.float32, 0) + 0.5
    sums = inputs.T @ inputs, inputs.sum(0)
    for averages in ((sums[0] / 50, sums[1]), (torch.zeros(8, 8), sums[1] / 50)):
        with pytest.raises(NumericalError, match=r"mean is above its mean square.*divide both sums by their number"):
            InputMoments.from_averages(*averages, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_what_tokens_give_passes_however_few_they_are(dtype, mean):
    """Rank-deficient ones have eigenvalues of rounding, of either sign."""
    for seed, (tokens, width) in enumerate([(1, 2), (3, 8), (20, 40), (4000, 8), (100, 200), (2048, 4), (5000, 64)]):
        inputs = mean + random_moments(tokens, width, dtype, seed)
        collected = InputMoments.from_samples(inputs)
        # As if from elsewhere: nothing is taken on trust.
        replace(collected, proved=None).check()
        averages = (inputs.T @ inputs / tokens, inputs.mean(0), tokens)
        InputMoments.from_averages(*averages).check()
        dense = inputs + 1e-3 * random_moments(tokens, width, dtype, seed + 1)
        InputMoments.from_averages(
            *averages, DenseMoments(dense.T @ inputs / tokens, dense.T @ dense / tokens, dense.mean(0))
        ).check()
        OutputMetric((inputs.T @ inputs) / tokens, torch.zeros(width, dtype=dtype), tokens).check()


def test_collected_moments_cost_no_factorisation_and_others_cost_one(monkeypatch):
    calls = []
    look = optprune.numerics.gram.check_average
    for module in ("optprune.moments", "optprune.metric"):
        monkeypatch.setattr(f"{module}.check_average", lambda *args: calls.append(args[3]) or look(*args))
    inputs = random_moments(50, 4)
    collected = InputMoments.from_samples(inputs, 1.1 * inputs)
    metric = OutputMetric.from_samples(random_moments(50, 3))
    loss = LayerLoss.of(torch.ones(3, 4), collected.merge(collected).to(torch.float64), 0.1, metric=metric.damped(0.1))
    loss.row_scaled(), loss.whitened(), loss.damped(0.2), replace(loss, moments=loss.moments.centred())
    assert calls == []
    other = replace(collected, proved=None)
    for damping in (0.0, 0.1):
        LayerLoss.of(torch.ones(3, 4), other, damping).damped(0.3)
    assert calls == ["the Gram matrix", "the covariance of the drift x* - x"]
