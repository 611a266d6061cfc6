"""Granite 4 with experts beside an MLP that every token goes through: folders, recipes, streaming and training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import tiny
from optprune.export import save_model
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.mixed_models import check_layers_get_sparse, check_uneven_folder, generated, mixed
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
made = partial(tiny, "granitemoehybrid", num_hidden_layers=4, **EXPERTS)
TOKENS = torch.arange(10, 58)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def test_the_layers_of_a_block_are_those_of_its_shape() -> None:
    """The MLP makes both halves of its hidden units in one layer; those of an expert are two."""
    decoder = Decoder(made())
    for block, shape in enumerate(decoder.shapes()):
        assert (shape.mlp_width, shape.experts) == (48, 4)
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())
        assert sizes["shared_mlp.input_linear"] == (256, 64)


def test_experts_go_and_the_folder_is_that_of_the_stock_class(tmp_path: Path) -> None:
    model = made()
    prune(model, batches(), load_recipe("experts_best", {"sparsity": 0.1}))
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_local_experts == 3
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert generated(again) == generated(again, use_cache=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.block_sparse_moe.input_linear.weight"].shape == (3, 96, 64)
    assert stored["model.layers.0.block_sparse_moe.router.layer.weight"].shape == (3, 64)


def test_blocks_that_differ_are_loaded_without_optprune(tmp_path: Path) -> None:
    """A fresh process compares the logits, with the files in the folder."""
    check_uneven_folder(mixed(made()), tmp_path / "out", TOKENS, logits)


def test_single_weights_of_every_layer_go(tmp_path: Path) -> None:
    check_layers_get_sparse(made(num_hidden_layers=2), tmp_path / "out", logits)


@pytest.mark.parametrize("recipe", ["experts_best", "fasp"])
def test_streamed_and_resumed_runs_give_the_same_weights(recipe: str, tmp_path: Path) -> None:
    found = load_recipe(recipe, {"sparsity": 0.1, **({"units": "mlp"} if recipe == "fasp" else {})})
    check_every_way_gives_the_same("granitemoehybrid", found, tmp_path, shared=False, **EXPERTS)
