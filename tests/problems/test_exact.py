"""Measuring in float64 block by block: the same numbers, and no copies of whole matrices."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optprune.problems import exact
from optprune.testing.loss_strategies import METRIC_KINDS, losses, metrics, weights
from optprune.testing.quadratic import Quadratic, array
from tests.helpers import measuring
from tests.helpers.memory import MIB, told


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
        residual = loss.exact_residual(weight)
    whole = replace(loss).exact_residual(weight)
    sizes = loss.residual_rounding(weight)[:, None] * loss.input_scale
    assert bool(((residual - whole).abs() <= loss.moments.width * sizes).all())


@told
@pytest.mark.parametrize("full", [False, True])
def test_measuring_takes_a_few_blocks_and_no_copy_of_the_layer(full):
    # In a process of its own: what other tests have freed here lies between what is still in use.
    run = [sys.executable, "-m", measuring.__name__, str(int(full))]
    taken = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    # That much are copies of the Gram matrix and of one weight in float64.
    copies = 8 * measuring.WIDTH * (measuring.WIDTH + measuring.OUT)
    assert taken < copies, f"{taken / MIB:.0f} MiB"
