"""Rotated inputs: every loss is what it was, and so is every output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, Rotation

SLOTS, SIZE, TIED, REST = 2, 3, 2, 1
WIDTH = SLOTS * SIZE * TIED + REST


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def link() -> Channels:
    """Units of two slots, each with two columns, in no order; the first column belongs to none."""
    columns = torch.randperm(WIDTH - REST, generator=torch.Generator().manual_seed(5)).reshape(-1, TIED) + REST
    return Channels(columns, torch.arange(SLOTS * SIZE) % SLOTS)


def rotation() -> Rotation:
    return Rotation.of(torch.linalg.qr(draw(SLOTS, SIZE, SIZE, seed=7))[0], link())


def whole(rotated: Rotation) -> Tensor:
    """Q, entry by entry from its meaning."""
    found = torch.eye(WIDTH, dtype=torch.float64)
    for slot in range(SLOTS):
        for tied in range(TIED):
            columns = [int(rotated.columns[slot, unit, tied]) for unit in range(SIZE)]
            for row, column in enumerate(columns):
                found[column, columns] = rotated.matrices[slot, row]
    return found


def loss(*, drift: bool, fit_bias: bool = False) -> LayerLoss:
    inputs = draw(40, WIDTH, seed=1)
    dense = inputs + 0.1 * draw(40, WIDTH, seed=2) if drift else None
    return LayerLoss.of(draw(5, WIDTH, seed=3), InputMoments.from_samples(inputs, dense), 0.02, fit_bias=fit_bias)


def test_it_is_an_orthogonal_matrix_that_mixes_tied_columns_alike() -> None:
    turned, weight = rotation(), draw(5, WIDTH, seed=4)
    matrix = whole(turned)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(turned.onto(weight), weight @ matrix)
    torch.testing.assert_close(turned.back(turned.onto(weight)), weight)


@pytest.mark.parametrize("fit_bias", [False, True])
@pytest.mark.parametrize("drift", [False, True])
def test_every_loss_is_what_it_was(drift: bool, fit_bias: bool) -> None:
    turned, before = rotation(), loss(drift=drift, fit_bias=fit_bias)
    after = turned.loss(before)
    for seed in range(3):
        weight = draw(5, WIDTH, seed=10 + seed)
        assert after.value(turned.onto(weight)) == pytest.approx(before.value(weight), rel=1e-12)
        torch.testing.assert_close(after.bias_change(turned.onto(weight)), before.bias_change(weight))
    assert after.relative_error(turned.onto(draw(5, WIDTH))) == pytest.approx(before.relative_error(draw(5, WIDTH)))


@pytest.mark.parametrize("drift", [False, True])
def test_the_moments_are_those_of_rotated_inputs(drift: bool) -> None:
    turned, inputs = rotation(), draw(40, WIDTH, seed=1)
    dense = inputs + 0.1 * draw(40, WIDTH, seed=2) if drift else None
    found = turned.moments(InputMoments.from_samples(inputs, dense))
    matrix = whole(turned)
    expected = InputMoments.from_samples(inputs @ matrix, None if dense is None else dense @ matrix)
    for one, other in zip(found.parts(), expected.parts(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert found.tokens == expected.tokens
    found.check()


def test_the_rows_that_make_the_inputs_make_rotated_ones() -> None:
    """Units of the rows go slot by slot, as those of heads do."""
    matrices = torch.linalg.qr(draw(SLOTS, SIZE, SIZE, seed=8))[0]
    turned, rows, given = Rotation(matrices, torch.zeros(SLOTS, SIZE, 1).long()), draw(SLOTS * SIZE, 4), draw(4, 9)
    made = rows @ given
    expected = torch.cat([matrices[slot].T @ made[slot * SIZE : (slot + 1) * SIZE] for slot in range(SLOTS)])
    torch.testing.assert_close(turned.rows(rows) @ given, expected)
    torch.testing.assert_close(turned.rows(made[:, 0]), expected[:, 0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="2 slots of 3 units are rotated by matrices"):
        Rotation.of(torch.eye(3)[None], link())
    uneven = loss(drift=False)
    uneven = replace(uneven, damping=torch.linspace(0, 1, WIDTH, dtype=torch.float64))
    with pytest.raises(InputError, match="damped alike"):
        rotation().loss(uneven)
