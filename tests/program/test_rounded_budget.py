"""Rounding of a budget: what is missed by more than a weight and a hundredth is told, and an error in strict mode."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from optprune.errors import StrictError
from optprune.models import Decoder, load_config, load_shapes
from optprune.program import Request, resolve
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.tiny_models import tiny_llama, tiny_mixture
from tests.helpers.token_batches import batches

ROUNDED = "the budget is rounded: {} of the decoder's linear weights are removed, not {}, as "
"""the layers of the tiny models have 64 and 128 inputs, two thirds of the weights in those with 64"""


def noted(decoder: Decoder, recipe: str, **fields: Any) -> list[str]:
    """Return the sentences on rounding, which are known before a weight is read."""
    notes = resolve(decoder, Request(recipe=load_recipe(recipe, fields))).notes
    return [note for note in notes if "rounded" in note]


@pytest.mark.parametrize(
    ("recipe", "sparsity", "reached"),
    [
        ("wanda", 0.001, "0%"),
        ("wanda", 0.01, "1.39%"),  # 1 of 64 and 1 of 128
        ("wanda", 0.05, "4.69%"),  # 3 of 64 and 6 of 128
        ("magnitude", 0.00001, "0%"),
        ("sparsegpt", 0.001, "0.0977%"),  # 4 of 4096 and 8 of 8192
    ],
)
def test_single_weights_that_round_to_less_or_more_than_asked(recipe: str, sparsity: float, reached: str) -> None:
    decoder = Decoder(tiny_llama())
    [note] = noted(decoder, recipe, sparsity=sparsity)
    assert note.startswith(ROUNDED.format(reached, f"{100 * sparsity:.3g}%"))
    with pytest.raises(StrictError, match="the budget is rounded"):
        resolve(decoder, Request(recipe=load_recipe(recipe, {"sparsity": sparsity, "strict": True})))


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("recipe", ["wanda", "magnitude", "sparsegpt", "fasp", "flap", "structured_uniform_best"])
def test_usual_budgets_of_a_real_model_are_met(recipe: str, sparsity: float) -> None:
    assert not noted(load_shapes("demo", load_config("demo")), recipe, sparsity=sparsity, strict=True)


def test_a_pattern_of_groups_is_met_exactly() -> None:
    assert not noted(load_shapes("demo", load_config("demo")), "wanda", **{"units.weights": "2:4"}, strict=True)


@pytest.mark.parametrize(
    ("make", "recipe", "fields", "reached"),
    [
        # One of two attentions stays, and each is a sixth of the weights.
        (tiny_llama, "depth", {"sparsity": 0.5, "allocation.parts": "attention"}, "16.7%"),
        # 8 of the 128 hidden units of one MLP are a 24th of its block's 36864 weights.
        (tiny_llama, "structured_best", {"sparsity": 0.001, "units": "mlp"}, "2.08%"),
        # An expert of four in both blocks is three quarters of a quarter.
        (lambda: tiny_mixture("mixtral"), "reap", {"sparsity": 0.1}, "18.8%"),
    ],
)
def test_units_that_come_to_far_less_or_more_than_asked(
    make: Any, recipe: str, fields: dict[str, Any], reached: str
) -> None:
    report = prune(make(), batches(), load_recipe(recipe, fields))
    [note] = [note for note in report.notes if "rounded" in note]
    assert note.startswith(ROUNDED.format(reached, f"{100 * fields['sparsity']:.3g}%"))
    assert f"{100 * report.sparsity_reached:.3g}%" == reached
    with pytest.raises(StrictError, match="the budget is rounded"):
        prune(make(), batches(), load_recipe(recipe, {**fields, "strict": True}))


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("structured_best", {"sparsity": 0.2, "units": "mlp", "allocation.probe_tokens": 0}),
        ("sparse_best", {"sparsity": 0.2, "units.weights": "2:4"}),
    ],
)
def test_a_step_of_what_is_removed_whole_is_no_missed_budget(recipe: str, fields: dict[str, Any]) -> None:
    model: PreTrainedModel = tiny_llama()
    assert not [note for note in prune(model, batches(), load_recipe(recipe, fields)).notes if "rounded" in note]
