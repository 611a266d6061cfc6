"""Permuted inputs: every loss is what it was, and so is every output."""

import pytest
import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, Permutation

SLOTS, SIZE, TIED, REST = 2, 3, 2, 1
WIDTH = SLOTS * SIZE * TIED + REST
UNITS = torch.tensor([2, 5, 4, 1, 0, 3])
"""a new order of the units, which have the slots 0, 1, 0, 1, 0, 1"""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def link() -> Channels:
    """Units of two slots, each with two columns, in no order; the first column belongs to none."""
    columns = torch.randperm(WIDTH - REST, generator=torch.Generator().manual_seed(5)).reshape(-1, TIED) + REST
    return Channels(columns, torch.arange(SLOTS * SIZE) % SLOTS)


def permutation() -> Permutation:
    return Permutation.of(UNITS, link(), WIDTH)


def whole() -> Tensor:
    """The matrix P of x' = P^T x, entry by entry from its meaning."""
    found, columns = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), link().columns.tolist()
    found[0, 0] = 1
    for place, unit in enumerate(UNITS.tolist()):
        for tied in range(TIED):
            found[columns[unit][tied], columns[place][tied]] = 1
    return found


@pytest.mark.parametrize("fit_bias", [False, True])
@pytest.mark.parametrize("drift", [False, True])
def test_every_loss_is_what_it_was(drift: bool, fit_bias: bool) -> None:
    inputs, order, matrix = draw(40, WIDTH, seed=1), permutation(), whole()
    dense = inputs + 0.1 * draw(40, WIDTH, seed=2) if drift else None
    moments, damping = InputMoments.from_samples(inputs, dense), draw(WIDTH, seed=9).abs()
    before = LayerLoss(draw(5, WIDTH, seed=3), moments, damping, fit_bias)
    after = order.loss(before)
    expected = InputMoments.from_samples(inputs @ matrix, None if dense is None else dense @ matrix)
    for one, other in zip(after.moments.parts(), expected.parts(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    after.moments.check()
    assert after.moments.tokens == moments.tokens
    for seed in range(3):
        weight = draw(5, WIDTH, seed=10 + seed)
        torch.testing.assert_close(order.onto(weight), weight @ matrix)
        assert torch.equal(order.back(order.onto(weight)), weight)
        assert after.value(order.onto(weight)) == pytest.approx(before.value(weight), rel=1e-12)
        torch.testing.assert_close(after.bias_change(order.onto(weight)), before.bias_change(weight))


def test_the_rows_that_make_the_inputs_make_permuted_ones() -> None:
    """Units may have several rows, as where one layer makes the gate and what passes it."""
    own, made = torch.arange(12).reshape(2, 6).T, draw(12, 4)
    expected = made.clone()
    for place, unit in enumerate(UNITS.tolist()):
        expected[own[place]] = made[own[unit]]
    rows = own.reshape(-1)
    found = made.clone()
    found[rows] = permutation().rows(made[rows])
    assert torch.equal(found, expected)
    assert torch.equal(permutation().rows(made[rows, 0]), expected[rows, 0])


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([0, 1, 2, 3, 4, 4], "must contain each of them once"),
        ([0, 1, 2], "an order of 6 units"),
        ([1, 0, 2, 3, 4, 5], "unit 1 moves to position 0 of another"),
    ],
)
def test_what_is_no_order_within_slots_is_refused(units: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Permutation.of(torch.tensor(units), link(), WIDTH)
