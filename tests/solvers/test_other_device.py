"""On a device that is not the CPU, which is pretended: solvers and whole runs give the same numbers, and stay there.

A tensor that is forgotten on the CPU, or numbers given to NumPy where they are, fail there as on a GPU.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import optprune
from optprune.errors import InputError, OptpruneError
from optprune.solvers import Chain, solve
from optprune.testing.strategies import STRATEGIES, VARIABLE, chosen_device, weighted
from tests.helpers.moved import moved
from tests.helpers.pretend import NAME, set_up, watched
from tests.helpers.solver_table import KINDS, SOLVERS
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

FEW = settings(max_examples=2, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.mark.e2e
@pytest.mark.parametrize("solver", [one for one in SOLVERS if not isinstance(one, Chain)], ids=lambda one: one.label)
def test_a_solver_gives_the_same_weights_on_the_other_device(solver):
    tried = []
    for kind in KINDS:

        @FEW
        @given(STRATEGIES[kind](dtype=torch.float32) | weighted(kind, "full", dtype=torch.float32))
        def check(problem):
            problem = moved(problem, "cpu")
            if solver.refusal(problem.in_output_basis()[0]) is not None:
                return
            try:
                expected = solve(problem, solver)
            except OptpruneError:
                # What is refused for its numbers is refused there as well, which the laws look at.
                return
            there = moved(problem, set_up())
            found = solve(there, solver)
            tried.append(type(problem))
            assert found.value.device.type == NAME
            assert torch.equal(found.value.cpu(), expected.value)
            assert found.status == expected.status
            # Objectives are by float32 products there.
            assert abs(found.objective - expected.objective) <= problem.loss.rounding(expected.value)

        check()
    assert tried


@pytest.mark.parametrize("recipe", ["fasp", "osscar", "sparsegpt"])
def test_a_whole_run_on_the_other_device_gives_the_same_bytes(recipe):
    """With plain attention: torch has other kernels for the fused one where it does not know the device."""
    here, there = (tiny_llama(attn_implementation="eager") for _ in range(2))
    there = there.to(set_up())
    with watched() as found:
        report = optprune.prune(there, batches(2), optprune.load_recipe(recipe))
    expected = optprune.prune(here, batches(2), optprune.load_recipe(recipe))
    assert report.sparsity_reached == expected.sparsity_reached
    # It was there that all was computed.
    assert len(found.launches) > 1000
    state = there.state_dict()
    for name, value in here.state_dict().items():
        assert state[name].device.type == NAME
        assert torch.equal(state[name].cpu(), value), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_variable_says_where_the_tensors_of_the_tests_are(kind, monkeypatch):
    monkeypatch.setenv(VARIABLE, set_up().type)

    @FEW
    @given(weighted(kind, "full"))
    def check(problem):
        places = [part for part in vars(problem.loss.moments).values() if isinstance(part, torch.Tensor)]
        places += [problem.loss.weight, problem.loss.damping, problem.loss.metric.average]
        assert {part.device.type for part in places} == {NAME}
        assert problem.start().device.type == NAME

    check()


def test_without_the_variable_it_is_the_cpu_and_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert chosen_device() == torch.device("cpu")
    for name in ("meta", "abacus"):
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(InputError, match=f"OPTPRUNE_TEST_DEVICE names the device '{name}', which cannot be used"):
            chosen_device()


def test_what_is_forgotten_on_the_cpu_is_noticed():
    there = torch.ones(3, device=set_up())
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=set_up(), generator=torch.Generator())
    with watched() as found:
        there[there > 0].sum().item()
    assert found.waits == ["index", "_local_scalar_dense"]
