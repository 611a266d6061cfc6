"""Texts that repeat themselves: their tokens are many, and what they tell about a model is little."""

from functools import cache

import pytest
import torch
from torch import Tensor

from optprune.calibration.stream import repeated_text
from optprune.errors import StrictError
from optprune.pruning import prune
from optprune.recipe import load_recipe, recipe_names
from optprune.texts import Text, demo_articles, draw_windows
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama, tiny_tokenizer
from tests.helpers.token_batches import batches

CONSTANT, WINDOW = "well " * 6000, " ".join(demo_articles("calibration")[0].split()[:20]) + " "
TEXTS = {"constant": [CONSTANT], "a window again and again": [WINDOW * 300], "real": demo_articles("calibration")[:40]}
REPEATED = tuple(TEXTS)[:2]
TOKENS = 16 * 64


@cache
def drawn(name: str) -> list[Tensor]:
    """Return windows of a text, in more tokens than the widest layer of the tiny models has inputs."""
    return list(draw_windows(tiny_tokenizer(), [Text(name, TEXTS[name])], TOKENS // 64, 64, seed=0).batches)


def model_for(recipe: str) -> torch.nn.Module:
    return ALL_MODELS["mixtral"]() if load_recipe(recipe).units.name == "experts" else tiny_llama()


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("text", REPEATED)
def test_a_text_that_repeats_itself_fails_strict_mode(name: str, text: str) -> None:
    recipe = load_recipe(name, {"strict": True, "vocabulary": None})
    with pytest.raises(StrictError, match=r"the calibration text repeats itself: it has .* of 8 tokens, fewer than"):
        prune(model_for(name), drawn(text), recipe)


@pytest.mark.parametrize("name", ["fasp", "wanda", "depth", "reap"])
def test_real_text_has_no_note_on_its_variety(name: str) -> None:
    report = prune(model_for(name), drawn("real"), load_recipe(name))
    every = [*report.notes, *(note for layer in report.layers for note in layer.notes)]
    assert not [note for note in every if "repeats itself" in note or "directions" in note]


def test_a_layer_whose_inputs_vary_in_few_directions_has_a_note() -> None:
    """Twelve tokens in any order never repeat a context, and have twelve inputs of the first layers."""
    ids = torch.randint(5, 17, (32, 64), generator=torch.Generator().manual_seed(0))
    report = prune(tiny_llama(), list(ids.split(4)), load_recipe("wanda"))
    notes = {layer.name: layer.notes for layer in report.layers}
    few = "the calibration tokens vary in fewer directions (12) than half of 64 inputs"
    assert few in notes["model.layers.0.self_attn.q_proj"]
    assert not any("repeats itself" in note for note in report.notes)


def test_contexts_are_counted_over_all_windows() -> None:
    first, second = torch.arange(64).view(1, 64), torch.arange(64, 128).view(1, 64)
    assert repeated_text([first, second] * 4, 114) == ()
    [note] = repeated_text([first, second] * 4, 115)
    assert "it has 114 contexts of 8 tokens, fewer than the 115 inputs" in note
    shifted = torch.cat([first, first], 1)[:, :120].unfold(1, 64, 7).reshape(-1, 64)
    assert "it has 64 contexts" in repeated_text([shifted], 115)[0], "windows that begin elsewhere are the same text"
    assert repeated_text(batches(), 1 << 20) == (), "few tokens of which none repeats are another matter"
    assert "it has 1 context of 8" in repeated_text([torch.ones(1, 3), torch.ones(1, 3)], 64)[0]
