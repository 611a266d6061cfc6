"""Gram matrices by bfloat16 products, on a CPU: exact products, the bounds of the parts, and moments made of them."""

import pytest
import torch

from optprune.moments import InputMoments, MomentSums
from optprune.numerics import gram
from optprune.numerics.gram import gram_product, split

LEFT_OUT = {1: 2.0**-7 + 2.0**-16, 2: 2.0**-15 + 2.0**-32, 3: 2.0**-23 + 2.0**-32}
"""of the sum of the sizes of the terms"""


def values(tokens=200, width=12, seed=0):
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.randint(-12, 12, (tokens, width), generator=generator)
    return sizes * torch.randn(tokens, width, generator=generator)


def test_a_product_of_two_bfloat16_numbers_is_exact_in_float32():
    """All pairs of significands; exponents only add up."""
    whole = torch.arange(128, 256, dtype=torch.float32)
    held = whole.bfloat16()
    assert torch.equal(held.float(), whole)
    product = held.float()[:, None] * held.float()
    assert torch.equal(product.double(), whole.double()[:, None] * whole.double())


def test_three_parts_add_up_to_a_float32_number_and_each_is_small():
    x = values(4000)
    parts = [part.double() for part in split(x, 3)]
    assert torch.equal(sum(parts), x.double())
    for place, part in enumerate(parts[1:], 1):
        assert bool((part.abs() <= 2.0 ** (-8 * place) * x.double().abs()).all())


@pytest.mark.parametrize("parts", LEFT_OUT)
def test_what_parts_leave_out_is_within_its_bound(parts):
    # One token: nothing is added up, so that all that is off was left out, but for a rounding of each sum.
    for seed in range(20):
        x = values(1, 64, seed)
        exact, sizes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
        off = (gram_product(x, parts).double() - exact).abs()
        assert bool((off <= (LEFT_OUT[parts] + 3 * 2.0**-24) * sizes).all())
        # No less than a tenth of it somewhere: it is not another number of parts.
        assert bool((off >= LEFT_OUT[parts] / 10 * sizes).any()) or parts == 3


@pytest.mark.parametrize("parts", LEFT_OUT)
def test_a_gram_matrix_is_within_its_bound_and_symmetric(parts):
    x = values()
    exact, sizes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    found = gram_product(x, parts)
    rounding = 4 * len(x) * 2.0**-24
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= (LEFT_OUT[parts] + rounding) * sizes).all())
    # The terms that are left out are symmetric: the halves differ by rounding alone, which the kernel decides.
    assert bool(((found - found.T).abs() <= 2 * rounding * sizes).all())


def test_moments_of_bfloat16_inputs_are_those_of_float32_ones(monkeypatch):
    """Where the mean is a hundred times the deviations, which is what centring is for; and of a constant input."""
    generator = torch.Generator().manual_seed(0)
    means = 100 * torch.tensor([0, 1, -1, 0.01, 1, 1])
    inputs = (torch.randn(5000, 6, generator=generator) + means).bfloat16()
    inputs[:, 4] = 77.0
    expected = InputMoments.from_samples(inputs.double())
    asked = []

    def on_tensor_cores(given):
        asked.append(given.dtype)
        return given.dtype == torch.bfloat16

    monkeypatch.setattr(gram, "on_tensor_cores", on_tensor_cores)
    sums = MomentSums(6, inputs.device)
    for batch in inputs.split(1500):
        sums.add(batch)
    found = sums.moments()
    size = expected.covariance.diagonal().sqrt()
    off = (found.covariance.double() - expected.covariance).abs()
    assert asked == [torch.bfloat16] * 4
    # The bound of a float32 sum of 1500 products, in whatever order a machine adds them.
    assert bool((off <= 1500 * 2.0**-24 * torch.outer(size, size)).all())
    assert torch.allclose(found.mean.double(), expected.mean, rtol=1e-6)
    assert not found.covariance[4].any()
    # Three products of parts, in place of one of float32.
    monkeypatch.setattr(gram, "on_tensor_cores", lambda _: False)
    assert torch.allclose(InputMoments.from_samples(inputs).covariance, found.covariance, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_and_for_float32_nothing_is_split():
    assert not gram.on_tensor_cores(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not gram.on_tensor_cores(torch.zeros(2, 2))
