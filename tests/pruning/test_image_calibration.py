"""Pruning on records with images: every family, in memory and block by block, by workers too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optprune
from optprune.export import save_model
from optprune.models import ImageFeatures, load_model, open_model
from optprune.models.images import image_features
from optprune.models.load import vision_folder
from optprune.pruning import PartialSums, Processes
from optprune.recipe import load_recipe
from tests.helpers.tiny_vision import answer, by_vision_family, save_vision, stock, tiny_vision, with_image

WEIGHTS = "model.safetensors"


def records(folder: Path, count: int = 4) -> tuple[list[Tensor], ImageFeatures]:
    """Token ids of records with an image and of a text, and the features of the images."""
    whole, config = vision_folder(str(folder)), stock(folder).config
    assert whole is not None
    inputs = [with_image(config, seed) for seed in range(count)]
    batches, images = image_features(whole, inputs, dtype=torch.float32, device=torch.device("cpu"))
    return [*batches, torch.randint(3, 490, (2, 20), generator=torch.Generator().manual_seed(0))], images


@by_vision_family
def test_streaming_is_memory_bit_for_bit_and_an_image_is_answered(family: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    batches, images = records(folder)
    recipe = load_recipe("structured_uniform_best", {"sparsity": 0.2, "refit.held_out": 0.3})
    runs: list[tuple[Any, ImageFeatures]] = [(load_model, images), (open_model, images)]
    runs.append((load_model, ImageFeatures(0 * images.rows, images.vocabulary, images.further, images.deep)))
    found = []
    for number, (read, given) in enumerate(runs):
        loaded, out = read(folder), tmp_path / f"out{number}"
        report = optprune.prune(loaded.model, batches, recipe, store=loaded.store, images=given)
        save_model(loaded, out, report=report, check_tokens=torch.arange(10, 42)[None])
        found.append((out / WEIGHTS).read_bytes())
    assert found[0] == found[1] != found[2]
    dense, pruned = (answer(stock(each))[0] for each in (folder, tmp_path / "out0"))
    assert dense.shape == pruned.shape and 0 < (dense - pruned).norm() < dense.norm()


@pytest.mark.e2e
def test_workers_get_what_belongs_to_a_record(tmp_path: Path) -> None:
    """Positions and features of Qwen3-VL."""
    folder = save_vision(tiny_vision("qwen3_vl"), tmp_path / "model")
    batches, images = records(folder)
    recipe, found = load_recipe("fasp", {"sparsity": 0.2, "propagation": "intra"}), []
    for workers in (None, Processes(2)):
        loaded = load_model(folder)
        sums = PartialSums(2)
        optprune.prune(loaded.model, batches, recipe, images=images, workers=workers, partial_sums=sums)
        found.append(dict(loaded.model.named_parameters()))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
