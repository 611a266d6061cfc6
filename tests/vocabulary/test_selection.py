"""The k-th largest by bisection on the bits is the one that torch finds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.numerics.tensors import kth_largest


@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_it_is_the_value_of_kthvalue(data, dtype):
    size = 32 if dtype == torch.float32 else 64
    values = data.draw(st.lists(st.floats(allow_nan=False, width=size), min_size=1, max_size=20))
    repeated = data.draw(st.lists(st.sampled_from(values), max_size=10))
    score = torch.tensor([values + repeated, (values + repeated)[::-1]], dtype=dtype)
    for k in range(1, score.shape[1] + 1):
        expected = torch.kthvalue(score, score.shape[1] - k + 1, dim=1, keepdim=True).values
        assert torch.equal(kth_largest(score, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_keep_their_order(dtype):
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    ordered = [torch.inf, limits.max, 1.0, limits.tiny, smallest, 0.0, -smallest, -limits.tiny, -1.0, limits.min]
    score = torch.tensor([[*ordered, -torch.inf]], dtype=dtype)
    shuffled = score[:, torch.randperm(score.shape[1], generator=torch.Generator().manual_seed(0))]
    found = torch.cat([kth_largest(shuffled, k) for k in range(1, score.shape[1] + 1)], 1)
    assert torch.equal(found, score)


def test_a_large_matrix_has_the_same_threshold():
    score = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)).square()
    for k in (1, 100_000, 200_000):
        assert torch.equal(kth_largest(score, k), torch.kthvalue(score, score.shape[1] - k + 1, 1, True).values)
