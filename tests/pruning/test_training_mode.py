"""A model that was left in training mode: dropout has no part in pruning, in saving or in measuring."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optprune.export import save_model
from optprune.measure import perplexity
from optprune.models import load_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.tiny_models import tiny_opt
from tests.helpers.token_batches import batches

RECIPES = {
    "fasp": {"units": "all", "propagation": "cross", "refit.held_out": 0.25},
    "structured_best": {"sparsity": 0.2},
    "sparse_best": {},
    "depth": {"sparsity": 0.3},
}


def with_dropout() -> torch.nn.Module:
    return tiny_opt(dropout=0.5, attention_dropout=0.5)


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", RECIPES)
def test_pruning_does_the_same_in_training_mode(recipe: str) -> None:
    models = with_dropout().eval(), with_dropout().train()
    reports = [prune(model, batches(), load_recipe(recipe, RECIPES[recipe])) for model in models]
    still, training = (model.state_dict() for model in models)
    assert still.keys() == training.keys()
    assert all(torch.equal(value, training[name]) for name, value in still.items())
    assert reports[0].allocation == reports[1].allocation
    assert models[1].training and all(module.training for module in models[1].modules())


def test_saving_compares_what_the_model_answers_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reload(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        """What the fresh process does, here: a loaded model is in evaluation mode."""
        task = json.loads(words[3])
        recorded, again = load_file(task["record"]), load_model(task["folder"]).model
        assert not again.training
        with torch.no_grad():
            logits = again(recorded["input_ids"], use_cache=False).logits
        return subprocess.CompletedProcess(
            words, 0, json.dumps({"difference": float((logits - recorded["logits"]).abs().max())}), ""
        )

    monkeypatch.setattr(subprocess, "run", reload)
    model = with_dropout().train()
    assert save_model(model, tmp_path / "out", check_tokens=torch.arange(10, 42)[None]).logits_difference == 0
    assert model.training


def test_perplexity_is_that_of_evaluation() -> None:
    windows = torch.cat(batches())
    model = with_dropout().train()
    assert perplexity(model, windows).perplexity == perplexity(with_dropout(), windows).perplexity
    assert model.training
