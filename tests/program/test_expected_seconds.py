"""The guess of what a run's phases take: there for every recipe and architecture, and in proportion to the work."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optprune.allocation.uniform import uniform
from optprune.models import Decoder, Mlp
from optprune.program import time
from optprune.program.time import expected_seconds, operations_per_second
from optprune.recipe import load_recipe, recipe_names
from optprune.report import PHASES
from tests.helpers.programs import LENGTH, program_of
from tests.helpers.recipes import ANY_MODEL
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_fast_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "operations_per_second", lambda device: 2e9)


def shapes(name: str = "llama", **config: int) -> Decoder:
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(ALL_MODELS[name](**config).config))


@pytest.mark.parametrize("architecture", ALL_MODELS)
def test_every_recipe_has_an_expectation_of_every_phase(architecture: str) -> None:
    decoder = shapes(architecture)
    for name in recipe_names() if decoder.architecture.mixture else ANY_MODEL:
        recipe = load_recipe(name)
        if recipe.units.name == "experts":  # of which not every block has some
            recipe = recipe.with_sparsity(0.15)
        if any(kind.field in decoder.architecture.indivisible for kind in recipe.units.kinds):
            continue  # it is refused
        if recipe.vocabulary is not None:
            continue  # it removes nothing of the blocks
        found = expected_seconds(program_of(recipe, samples=128, decoder=decoder), 10**6, CPU)
        assert sorted(found) == sorted(PHASES)
        assert all(0 <= seconds < 1e4 for seconds in found.values()), name
        assert (found["metric"] > 0) == (recipe.metric is not None)
        assert (found["budget"] > 0) == (recipe.allocation.kind != "uniform"), name
        assert found["pruning"] > 0


def test_it_grows_with_the_tokens_and_the_blocks() -> None:
    recipe = load_recipe("structured_best", {"metric.tokens": 10**6})

    def expected(tokens: int, **config: int) -> dict[str, float]:
        return expected_seconds(program_of(recipe, samples=tokens // LENGTH, decoder=shapes(**config)), 0, CPU)

    some, more, deeper = expected(10**5), expected(2 * 10**5), expected(10**5, num_hidden_layers=4)
    for phase in ("metric", "budget", "pruning"):
        assert 1.5 < more[phase] / some[phase] < 2.1
        assert 1.3 < deeper[phase] / some[phase] < 2.1


def test_an_allocation_that_is_given_leaves_no_budget_to_divide() -> None:
    decoder, recipe = Decoder(tiny_llama()), load_recipe("structured_best")
    allocation = uniform(decoder, 0.25, Mlp(), 8)
    found = expected_seconds(program_of(recipe, decoder=decoder, allocation=allocation), 0, CPU)
    assert found["budget"] == 0 < found["pruning"]


def test_a_machine_is_as_fast_as_its_products() -> None:
    assert 1e7 < operations_per_second(CPU) < 1e13
