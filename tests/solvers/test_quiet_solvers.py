"""Solvers neither print, nor change the state of random numbers, nor move tensors to another device or dtype."""

import random
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor

from optprune.problems import Problem
from optprune.solvers import Solver, solve
from optprune.testing.strategies import STRATEGIES
from tests.helpers.solver_table import by_pair


def random_states() -> tuple[object, ...]:
    """The states of all generators of random numbers, as values that can be compared."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), kind, np.asarray(keys).tobytes(), *rest


def tensors(problem: Problem) -> list[Tensor]:
    loss = problem.loss
    return [loss.weight, loss.damping, *loss.moments.parts()]


@by_pair
@given(data=st.data())
@settings(max_examples=2, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_solver_neither_prints_nor_seeds_nor_moves(
    kind: type[Problem], solver: Solver, capfd: pytest.CaptureFixture[str], as_users_run: None, data: st.DataObject
) -> None:
    # As users run it, because beartype draws the items that it checks.
    drawn = data.draw(STRATEGIES[kind](dtype=torch.float32))
    problem = replace(drawn, loss=drawn.loss.damped(0.01))
    assume(solver.refusal(problem.in_output_basis()[0]) is None)
    before = [(each.dtype, each.device, each.clone()) for each in tensors(problem)]
    capfd.readouterr()
    states, threads, default = random_states(), torch.get_num_threads(), torch.get_default_dtype()
    found = solve(problem, solver, max_steps=50)
    after = random_states()
    assert after == states
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    for now, (dtype, device, values) in zip(tensors(problem), before, strict=True):
        assert (now.dtype, now.device) == (dtype, device) and torch.equal(now, values)
    assert (found.value.dtype, found.value.device) == (problem.loss.weight.dtype, problem.loss.weight.device)
