"""Measuring in float64 block by block: the same numbers, and no copies of whole matrices."""

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import LayerLoss, MaskedLeastSquares, exact
from optprune.problems.quadratic import Quadratic, array
from optprune.solvers import solve
from optprune.testing.strategies import METRIC_KINDS, losses, metrics, weights
from tests.helpers import measuring
from tests.helpers.memory import MIB, told
from tests.helpers.moved import moved
from tests.helpers.pretend import set_up


@given(losses(), st.data())
def test_blocks_of_any_size_measure_the_same(loss, data):
    rows, width = loss.weight.shape
    weight = data.draw(weights(width, rows=rows))
    loss = replace(loss, metric=data.draw(metrics(rows, data.draw(st.sampled_from(METRIC_KINDS)))))
    reference = Quadratic.of(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK", data.draw(st.integers(1, 3)))
        slack = loss.rounding(weight)
        assert abs(loss.value(weight) - reference.value(array(weight))) <= slack
        assert abs(loss.constant - reference.constant) <= slack
        residual = loss.exact.residual(weight)
    whole = replace(loss).exact.residual(weight)
    sizes = loss.residual_rounding(weight)[:, None] * loss.input_scale
    assert bool(((residual - whole).abs() <= loss.moments.width * sizes).all())


UNIT = 2.0**-24


def test_the_measuring_error_holds_where_rounding_makes_the_error_of_the_outputs_negative():
    """Two nearly equal inputs in float32: their covariance is indefinite, which the damping makes up for."""
    negative = 0
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        inputs[:, 0] = inputs[:, 1] + 1e-7 * inputs[:, 0]
        loss = LayerLoss.of(torch.randn(1, 4, generator=generator), InputMoments.from_samples(inputs.float()), 1e-6)
        weight = solve(MaskedLeastSquares(loss, torch.tensor([[True, False, True, True]]))).value
        # The difference of two numbers in float32 of similar sizes is exact in float64.
        change = [Fraction(float(entry)) for entry in weight[0].double() - loss.weight[0].double()]
        rows = [[Fraction(float(entry)) for entry in row] for row in loss.moments.covariance]
        mean, damping = ([Fraction(float(entry)) for entry in part] for part in (loss.moments.mean, loss.damping))
        error = sum(change[i] * rows[i][j] * change[j] for i in range(4) for j in range(4))
        error += sum(one * average for one, average in zip(change, mean, strict=True)) ** 2
        ridge = sum(one * one * added for one, added in zip(change, damping, strict=True))
        assert abs(Fraction(loss.value(weight)) - max(error + ridge, 0) / 2) <= Fraction(loss.measuring_error(weight))
        negative += error < 0 < error + ridge
    assert negative


def gathered(parts):
    """The bound of a product of BLOCK terms with an operand that was rounded, or of two such products."""
    gamma = exact.BLOCK * UNIT / (1 - exact.BLOCK * UNIT)
    return ((1 + UNIT) * (1 + gamma)) ** parts - 1


def float32_bound(loss, weight):
    """What float32 products may do to E|V x* - W x|^2, as `ExactLoss.products` says; formed literally."""
    moments, rows = loss.moments, len(loss.weight)
    sizes = torch.eye(rows, dtype=torch.float64) if loss.metric is None else loss.metric.matrix.double().abs()
    change, original = (weight.double() - loss.weight.double()).abs(), loss.weight.double().abs()
    spread = moments.covariance.double().abs() + torch.outer(moments.mean.double().abs(), moments.mean.double().abs())
    terms = float(((sizes @ change) * (change @ spread)).sum())
    if moments.drift is not None:
        terms += 2 * float(((sizes @ change) * (original @ moments.drift.cross.double().abs())).sum())
        terms += float(((sizes @ original) * (original @ moments.drift.covariance.double().abs())).sum())
    # A hair for what is added up in float64.
    return gathered(2 if loss.coupled else 1) * terms * (1 + 1e-3)


def both(loss, weight):
    """E|V x* - W x|^2 by float32 products and by float64 ones."""
    slow = exact.ExactLoss(loss.weight, loss.moments, loss.damping, loss.metric)
    return replace(slow, products=torch.float32).measured(weight)[0], slow.measured(weight)[0]


@given(losses(dtype=torch.float32), st.data())
def test_float32_products_measure_to_their_bound_and_to_what_the_moments_are_known_to(loss, data):
    rows, width = loss.weight.shape
    kind = data.draw(st.sampled_from(METRIC_KINDS))
    loss = replace(loss, fit_bias=False, metric=data.draw(metrics(rows, kind, dtype=torch.float32)))
    weight = data.draw(weights(width, rows=rows, dtype=torch.float32))
    near = loss.weight + 1e-4 * (weight - loss.weight)
    for candidate in (weight, near):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exact, "BLOCK", data.draw(st.integers(1, 3)))
            fast, slow = both(loss, candidate)
            assert abs(fast - slow) <= float32_bound(loss, candidate)
        assert abs(fast - slow) / 2 <= loss.rounding(candidate)


@pytest.mark.parametrize("full", [False, True])
def test_float32_products_of_a_wide_layer_near_its_weight_keep_the_digits_of_a_small_loss(full):
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(64, 1100, generator=generator) + 3, torch.randn(6, 1100, generator=generator)
    metric = OutputMetric.from_samples(torch.randn(16, 6, generator=generator), full=full)
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), metric=metric)
    near = weight + 1e-5 * torch.randn(weight.shape, generator=generator)
    fast, slow = both(loss, near)
    assert slow < 1e-6 * loss.signal
    assert abs(fast - slow) <= min(float32_bound(loss, near), 1e-5 * slow)


def test_off_the_cpu_objectives_are_measured_by_float32_products_and_certificates_by_float64_ones():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(4, 9, generator=generator), torch.randn(40, 9, generator=generator)
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.01)
    candidate = weight.round()
    fast, slow = both(loss, candidate)
    there = moved(loss, set_up())
    error = 2 * there.value(candidate.to(set_up())) - loss.exact.measured(candidate)[1]
    assert fast != slow
    assert error == pytest.approx(fast, rel=1e-15)
    assert there.exact_value(candidate.to(set_up())) == loss.value(candidate) == loss.exact_value(candidate)
    whole = LayerLoss(weight.double(), loss.moments.to(torch.float64), loss.damping.double())
    double = moved(whole, set_up())
    assert double.value(candidate.double().to(set_up())) == double.exact_value(candidate.double().to(set_up()))


@pytest.mark.slow
@told
@pytest.mark.parametrize("full", [False, True])
def test_measuring_takes_a_few_blocks_and_no_copy_of_the_layer(full):
    # In a process of its own: what other tests have freed here lies between what is still in use.
    run = [sys.executable, "-m", measuring.__name__, str(int(full))]
    taken = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    # That much are copies of the Gram matrix and of one weight in float64.
    copies = 8 * measuring.WIDTH * (measuring.WIDTH + measuring.OUT)
    assert taken < copies, f"{taken / MIB:.0f} MiB"
