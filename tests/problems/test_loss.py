"""LayerLoss: its value is the mean over samples, its gradient is the slope, and bad input is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError, NumericalError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import LayerLoss
from optprune.problems.quadratic import Quadratic
from optprune.testing import laws
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import METRIC_KINDS, losses, samples, weights
from optprune.testing.transformations import in_units


@st.composite
def losses_with_samples(draw):
    """A loss, the samples it is of, and some other weight."""
    drawn = draw(samples())
    width = drawn.inputs.shape[1]
    weight = draw(weights(width))
    loss = LayerLoss.of(weight, drawn.moments(), draw(st.sampled_from((0.0, 0.1))), fit_bias=draw(st.booleans()))
    return loss, drawn, draw(weights(width, rows=weight.shape[0]))


@given(losses_with_samples())
def test_value_is_the_mean_over_the_samples(drawn):
    loss, data, other = drawn
    for weight in (loss.weight, torch.zeros_like(other), other):
        laws.value_is_the_mean_over_samples(loss, weight, data.inputs, data.dense)


@given(losses_with_samples(), st.sampled_from(METRIC_KINDS), st.sampled_from((torch.float64, torch.float32)))
def test_the_rounding_of_the_loss_is_that_of_the_references(drawn, kind, dtype):
    loss, _, other = drawn
    metric = None
    if kind != "none":
        metric = OutputMetric.from_samples(other.T.clone(), full=kind == "full").damped(0.1).to(dtype)
    loss = LayerLoss(loss.weight.to(dtype), loss.moments.to(dtype), loss.damping.to(dtype), loss.fit_bias, metric)
    for weight in (loss.weight, other.to(dtype)):
        assert loss.rounding(weight) == pytest.approx(rounding(loss, weight), rel=1e-10)


@given(losses(), st.integers(0, 100))
def test_units_of_inputs_change_no_value(loss, seed):
    width = loss.weight.shape[1]
    units = 2.0 ** torch.randint(-30, 12, (width,), generator=torch.Generator().manual_seed(seed)).double()
    other, weight = in_units(loss, units), torch.ones_like(loss.weight)
    alive = loss.gram.diagonal() > 0
    assert torch.equal(other.input_scale[alive], (loss.input_scale * units)[alive])
    # Powers of two round nothing.
    assert other.value(weight / units) == loss.value(weight)
    assert other.rounding(weight / units) == loss.rounding(weight)


@given(losses_with_samples())
def test_no_bias_does_better_than_the_fitted_one(drawn):
    loss, data, other = drawn
    if loss.fit_bias:
        ideal = data.inputs if data.dense is None else data.dense
        error = data.inputs @ other.T - ideal @ loss.weight.T
        # The bias that minimises a mean square is minus the mean.
        assert torch.allclose(loss.bias_change(other), -error.mean(0), rtol=1e-10, atol=1e-10)


@given(losses_with_samples())
def test_relative_error_is_the_undamped_mean_over_the_samples(drawn):
    loss, data, other = drawn
    ideal = data.inputs if data.dense is None else data.dense
    error, signal = data.inputs @ other.T - ideal @ loss.weight.T, ideal @ loss.weight.T
    if loss.fit_bias:
        error, signal = error - error.mean(0), signal - signal.mean(0)
    power = float(signal.square().sum(1).mean())
    # Where the signal is nothing but rounding there is nothing to be relative to.
    slack = 2 * rounding(loss, other)
    assert abs(loss.signal - power) <= 1e-12 * power + slack
    if power > 1e6 * slack:
        expected = float(error.square().sum(1).mean()) / power
        assert loss.relative_error(other) == pytest.approx(expected, rel=1e-5, abs=slack / power)


@given(losses(), st.data())
def test_value_is_the_quadratic_of_gram_target_and_constant(loss, data):
    other = data.draw(weights(loss.weight.shape[1], rows=loss.weight.shape[0]))
    literal = float(((other @ loss.gram) * other).sum() / 2 - (other * loss.target).sum()) + loss.constant / 2
    assert abs(loss.value(other) - literal) <= rounding(loss, other)
    assert abs(Quadratic.of(loss).value(other.numpy()) - literal) <= rounding(loss, other)


@given(losses(), st.data())
def test_gradient_is_the_slope_of_the_value(loss, data):
    rows, width = loss.weight.shape
    at = data.draw(weights(width, rows=rows, generic=True))
    towards = data.draw(weights(width, rows=rows, generic=True))
    # A central difference of a quadratic is exact for every step, so a step of one costs no digits.
    slope = (loss.value(at + towards) - loss.value(at - towards)) / 2
    slack = rounding(loss, at + towards) + rounding(loss, at - towards)
    assert abs(slope - float((loss.gradient(at) * towards).sum())) <= slack


@given(losses(), st.data())
def test_value_is_never_negative(loss, data):
    other = data.draw(weights(loss.weight.shape[1], rows=loss.weight.shape[0]))
    assert loss.value(other) >= 0
    assert loss.value(loss.weight) >= 0


@given(losses())
def test_the_original_weight_is_free_where_the_inputs_are_dense(loss):
    if loss.moments.dense is None:
        assert loss.value(loss.weight) == 0
        assert loss.pull is None
        assert loss.relative_error(loss.weight) == 0


def test_a_silent_layer_has_relative_error_zero_or_one():
    silent = LayerLoss.of(torch.zeros(1, 2), InputMoments.from_samples(torch.eye(2)))
    assert silent.relative_error(torch.zeros(1, 2)) == 0
    assert silent.relative_error(torch.ones(1, 2)) == 1


def test_damping_is_a_fraction_of_the_mean_diagonal():
    inputs = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    loss = LayerLoss.of(torch.ones(1, 2), InputMoments.from_samples(inputs), 0.5)
    # E x^2 = (2, 8), mean 5, half of it.
    assert loss.damping.tolist() == [2.5, 2.5]
    assert loss.gram.diagonal().tolist() == [4.5, 10.5]
    assert loss.damped(0.0).damping.tolist() == [0.0, 0.0]


def test_where_the_bias_is_free_damping_is_a_fraction_of_the_mean_variance():
    inputs = torch.tensor([[101.0, 1.0], [99.0, 9.0]])
    loss = LayerLoss.of(torch.ones(1, 2), InputMoments.from_samples(inputs), 0.5, fit_bias=True)
    # Variances 1 and 16, whatever the means: half of their mean of 8.5.
    assert loss.damping.tolist() == [4.25, 4.25]
    assert loss.gram.tolist() == [[1 + 4.25, -4.0], [-4.0, 16 + 4.25]]
    assert loss.damped(2.0).damping.tolist() == [17.0, 17.0]
    # Of a weight of which nothing is kept: half the variance of 1 x_1 + 1 x_2, 9, and half of the two dampings.
    assert loss.value(torch.zeros(1, 2)) == (9 + 8.5) / 2


def test_the_problem_keeps_its_own_copy_of_the_weight():
    weight = torch.ones(1, 2)
    loss = LayerLoss.of(weight, InputMoments.from_samples(torch.eye(2)))
    weight.zero_()
    assert loss.weight.tolist() == [[1.0, 1.0]]


@pytest.fixture
def plain():
    return LayerLoss.of(torch.ones(1, 2), InputMoments.from_samples(torch.eye(2)))


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_bad_damping_is_refused(plain, bad):
    with pytest.raises(InputError, match="damping"):
        plain.damped(bad)
    with pytest.raises(InputError, match="damping"):
        replace(plain, damping=torch.tensor([1.0, bad]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(plain, bad):
    with pytest.raises(InputError, match="NaN or infinity"):
        replace(plain, weight=torch.tensor([[1.0, bad]]))


def test_damaged_moments_are_refused(plain):
    gram = torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])
    with pytest.raises(NumericalError, match="NaN"):
        replace(plain, moments=InputMoments(gram, torch.zeros(2), 3))


def test_widths_must_agree(plain, as_users_run):
    with pytest.raises(InputError, match="3 inputs"):
        LayerLoss.of(torch.ones(1, 3), plain.moments)
    with pytest.raises(InputError, match="2 inputs"):
        replace(plain, damping=torch.ones(3))
