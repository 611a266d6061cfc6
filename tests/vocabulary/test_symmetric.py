"""Sums of squares: little more than half of each product is formed, and the sum is the whole one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optprune.moments import InputMoments, MomentSums
from optprune.numerics.tensors import all_finite

TOKENS = 40


def samples(width, seed):
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [64, 384, 600, 1000])
def test_moments_of_wide_layers_are_the_averages_they_say(width):
    inputs, drift = samples(width, 0), samples(width, 1)
    sums = MomentSums(width, torch.device("cpu"), with_dense=True)
    # In two parts, with the averages asked for in between.
    for part in (slice(0, 15), slice(15, None)):
        sums.add(inputs[part], (inputs - drift)[part])
        sums.moments(torch.float64)
    found = sums.moments(torch.float64)
    expected = [torch.cov(values.T, correction=0).reshape(width, width) for values in (inputs, drift)]
    assert found.drift is not None
    for covariance, right in zip((found.covariance, found.drift.covariance), expected, strict=True):
        # Sums of 40 products of numbers below about 5.
        assert torch.allclose(covariance, right, rtol=0, atol=1e-13)
        assert torch.equal(covariance, covariance.T)


def test_half_of_a_wide_product_is_formed():
    with FlopCounterMode(display=False) as counter:
        InputMoments.from_samples(samples(1536, 0))
    assert counter.get_total_flops() < 0.6 * (2 * TOKENS * 1536**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_every_value_is(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([], dtype=dtype))
    assert all_finite(torch.tensor([1.0, -2.0], dtype=dtype))
    # Their sum overflows.
    assert all_finite(torch.full((3,), largest, dtype=dtype))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.tensor([1.0, wrong], dtype=dtype))
    assert not all_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
