"""A run in one go, from files, taken up again, and shared among processes: the weights are the same."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from optprune.export import save_model
from optprune.models import open_model
from optprune.pruning import Journal, Processes, prune
from optprune.recipe import Recipe
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches


def check_every_way_gives_the_same(family: str, recipe: Recipe, place: Path, *, shared: bool, **config: Any) -> None:
    """Of a tiny model of a family; `shared` among processes too, which a policy must allow."""
    made = partial(ALL_MODELS[family], **config)
    model = made()
    model.save_pretrained(place / "dense")
    prune(model, batches(), recipe, journal=Journal(place / "run"))
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    streamed = open_model(place / "dense")
    prune(streamed.model, batches(), recipe, store=streamed.store)
    save_model(streamed, place / "out")
    resumed = made()
    prune(resumed, batches(), recipe, journal=Journal(place / "run", resume=True))
    models = [AutoModelForCausalLM.from_pretrained(place / "out"), resumed]
    if shared:
        models.append(made())
        prune(models[-1], batches(), recipe, workers=Processes(2))
    for each in models:
        assert each.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in each.state_dict().items())
