"""Matrices that files hold transposed: linear layers in memory, and the stock layout in state dicts and files."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optprune.export import save_model
from optprune.models import Decoder, Mlp, load_model, open_model
from optprune.models.checkpoint import Checkpoint
from optprune.pruning import prune
from optprune.pruning.journal import Journal
from optprune.recipe import load_recipe
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches
from tests.helpers.weights import weights_of

TOKENS = torch.arange(10, 42)[None]


def gpt2(**config: int) -> PreTrainedModel:
    return ALL_MODELS["gpt2"](**config)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_layer_is_linear_and_answers_bit_for_bit_as_before() -> None:
    stock = gpt2()
    model = copy.deepcopy(stock)
    layer = Decoder(model).layer(0, "attn.c_attn")
    held = stock.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(held, Conv1D) and not isinstance(layer, Conv1D) and isinstance(layer, nn.Linear)
    assert layer.weight.shape == (layer.out_features, layer.in_features) == (192, 64)
    assert torch.equal(layer.weight, held.weight.t())
    assert torch.equal(logits(model), logits(stock))


def test_nothing_is_copied() -> None:
    model = gpt2()
    before = model.get_parameter("transformer.h.0.attn.c_attn.weight").data_ptr()
    assert Decoder(model).layer(0, "attn.c_attn").weight.data_ptr() == before


def test_a_state_dict_goes_out_and_comes_in_as_the_stock_class_has_it() -> None:
    stock, model, other = gpt2(), gpt2(), gpt2(seed=1)
    Decoder(model)
    Decoder(other)
    state = stock.state_dict()
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(stock))


def test_plain_transformers_reads_what_it_saves_itself(tmp_path: Path) -> None:
    model = gpt2()
    decoder = Decoder(model)
    for block in range(2):
        [units] = Mlp().layers(decoder, block)
        decoder.keep_units(block, units, torch.arange(128) < 48)
    decoder.record_shapes()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded.get_submodule("transformer.h.0.mlp.c_fc")) is Conv1D
    assert torch.allclose(logits(reloaded), logits(model), atol=1e-5)


def test_a_checkpoint_without_the_head_is_read_block_by_block(tmp_path: Path) -> None:
    """The checkpoint on the hub has names that begin with h.0."""
    model = gpt2()
    trunk: Any = model.base_model
    trunk.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in Checkpoint.open(tmp_path).tensors
    there, opened = weights_of(load_model(tmp_path).decoder()), weights_of(open_model(tmp_path).decoder())
    assert there.keys() == opened.keys()
    assert all(torch.equal(there[name], opened[name]) for name in there)


def test_shards_that_a_run_has_made_are_turned_again(tmp_path: Path) -> None:
    """Two of the matrices are square, so that their shapes do not show the layout."""
    gpt2().save_pretrained(tmp_path / "dense")
    whole, journal = load_model(tmp_path / "dense"), Journal(tmp_path / "run")
    opened = open_model(tmp_path / "dense", sink=journal.sink)
    recipe = load_recipe("wanda", {"units.weights": "2:4"})
    prune(whole.model, batches(), recipe)
    prune(opened.model, batches(), recipe, store=opened.store, journal=journal)
    folder = save_model(opened, tmp_path / "out", made=journal.shards(), max_shard_size="300KB").folder
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(whole.model))
    shapes = {name: at.shape for name, at in Checkpoint.open(folder).tensors.items()}
    assert shapes == {name: at.shape for name, at in Checkpoint.open(tmp_path / "dense").tensors.items()}
