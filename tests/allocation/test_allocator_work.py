"""The work that allocators declare: in proportion to their passes, with nothing where nothing is measured."""

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from optprune.allocation import Allocator, ByCost, Dense, Depth, ExpertBudget, Given, MeasuredBudget, Uniform
from optprune.allocation.uniform import uniform
from optprune.calibration import fisher_pass
from optprune.calibration.stream import forward_work, head_weights
from optprune.models import UNITS, Decoder, Experts, Mlp
from optprune.recipe import load_recipe
from optprune.recipe.recipe import by_cost
from optprune.work import Work
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama


def shapes(name: str = "llama", **config: int) -> Decoder:
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(ALL_MODELS[name](**config).config))


def test_every_allocator_is_covered() -> None:
    """An allocator without a declaration of its own cannot be made."""
    kinds = {Uniform, Given, Dense, ByCost, ExpertBudget, Depth}
    found = {
        kind for kind in [*Allocator.__subclasses__(), *MeasuredBudget.__subclasses__()] if "optprune" in str(kind)
    }
    assert {kind for kind in found if not inspect.isabstract(kind)} == kinds
    assert inspect.isabstract(type("Silent", (Allocator,), {"check": None, "divide": None}))


def test_allocators_that_measure_nothing_take_nothing() -> None:
    decoder = Decoder(tiny_llama())
    given = Given(Mlp(), uniform(decoder, 0.25, Mlp(), 8))
    for allocator in (Uniform(Mlp(), 0.5, None), given, Dense()):
        assert allocator.work(shapes(), 10**6) == Work()


@pytest.mark.parametrize("name", ["structured_best", "sparse_best", "structured_uniform_best"])
def test_costs_take_a_pass_of_the_tokens_and_a_probe_more(name: str) -> None:
    decoder, recipe = shapes(), load_recipe(name, {"allocation.kind": "global"})
    allocator = by_cost(recipe)
    plain, probed = (replace(allocator, probe_tokens=count) for count in (0, 512))
    some, more = plain.work(decoder, 10**5), plain.work(decoder, 2 * 10**5)
    assert some.passes == more.passes == 1
    assert more.flops - some.flops > forward_work(decoder, 10**5).flops
    assert probed.work(decoder, 10**5).flops > some.flops
    assert probed.work(decoder, 10**5).bytes >= some.bytes > 0
    # Progress follows the same declaration: shares rise from zero to the divergences at the end.
    blocks, end = probed._works(decoder, 10**5, 512)
    assert sum(blocks, end).flops == pytest.approx(probed.work(decoder, 10**5).flops)


@pytest.mark.parametrize("name", ["structured_best", "sparse_best", "structured_uniform_best"])
def test_a_probe_keeps_the_layers_that_it_tries_in_float32(name: str) -> None:
    decoder = shapes(hidden_size=512, intermediate_size=2048)
    allocator = by_cost(load_recipe(name, {"allocation.kind": "global"}))
    # So few tokens that the statistics are the largest part.
    plain, probed = (replace(allocator, probe_tokens=count).work(decoder, 64).bytes for count in (0, 8))
    paths = {target.path for target in allocator.units.candidates(decoder, 0)}
    assert probed - plain == 4 * sum(decoder.layer(0, path).weight.numel() for path in paths) > 0


def test_experts_run_twice_and_their_probe_grows_with_the_blocks() -> None:
    units = UNITS["experts"]
    assert isinstance(units, Experts)
    found = [ExpertBudget(units, 0.25, 0.25, count).work(shapes("mixtral"), 10**5) for count in (0, 512)]
    assert found[0].passes == 2 and found[0].flops == pytest.approx(forward_work(shapes("mixtral"), 10**5, 2).flops)
    assert found[1].flops > found[0].flops
    deeper = ExpertBudget(units, 0.25, 0.25, 512).work(shapes("mixtral", num_hidden_layers=4), 10**5)
    assert deeper.flops > 1.5 * found[1].flops


def test_depth_takes_a_round_for_each_removal() -> None:
    decoder = shapes(num_hidden_layers=4)
    influence = Depth(0.25, "both", "influence", 512).work(decoder, 10**5)
    assert (influence.passes, influence.flops) == (2, forward_work(decoder, 10**5, 2).flops)
    some, more = (Depth(sparsity, "both", "perplexity", 512).work(decoder, 10**5) for sparsity in (0.125, 0.25))
    # One round of eight sub-blocks, and one more of seven.
    assert more.flops / some.flops == pytest.approx(15 / 8)


def test_depth_fills_what_is_left_of_its_budget_with_small_sub_blocks() -> None:
    decoder = shapes("mixtral", num_hidden_layers=4)
    small, large = (decoder.weights_of(decoder.shape(0).without(part)) for part in ("mlp", "attention"))
    budget = large + 2.2 * small
    depth = Depth(budget / decoder.linear_weights(), "both", "perplexity", 512)
    # An attention, an MLP, and then the attention of the second block: no other MLP fits.
    assert depth.head_tokens(decoder, 10**5) == 512 * (8 + 7 + 3)
    assert Depth(0.25, "both", "influence", 512).head_tokens(decoder, 10**5) == 0


def test_the_fisher_pass_takes_a_way_back_and_three_heads() -> None:
    decoder = shapes()
    once = fisher_pass.work(decoder, 1000)
    passes = forward_work(decoder, 1000, 1 + fisher_pass.PASSES_BACK).flops
    assert once.flops == pytest.approx(passes + 3 * 2 * 1.5 * 1000 * head_weights(decoder))
    full = fisher_pass.work(decoder, 1000, full=("mlp.down_proj",))
    assert full.flops > once.flops and full.bytes > once.bytes
    assert fisher_pass.work(decoder, 1000, full=("mlp.down_proj",), widest=1) == once
