"""Latent attention: heads and value dimensions go exactly, and the vectors of low rank stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optprune
from optprune.export import save_model
from optprune.models import ARCHITECTURES, Decoder, KvGroups, Values, architecture_of
from tests.helpers.mixed_models import check_layers_get_sparse, generated, mixed, narrow
from tests.helpers.tiny_models import ALL_MODELS

LATENT = [name for name, architecture in ARCHITECTURES.items() if architecture.latent is not None]
of_latent = pytest.mark.parametrize("name", LATENT)
WHOLE: dict[str, Any] = {"q_lora_rank": None}
"""the queries are made from the hidden states, as in small models of the class"""
TOKENS = torch.arange(10, 58)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@of_latent
def test_queries_of_the_hidden_states_have_one_layer(name: str) -> None:
    config = ALL_MODELS[name](**WHOLE).config
    assert architecture_of(config).query == "self_attn.q_proj"
    assert not {"self_attn.q_a_proj", "self_attn.q_b_proj"} & set(architecture_of(config).layers)
    assert "self_attn.q_proj" not in architecture_of(ALL_MODELS[name]().config).layers


@pytest.mark.parametrize("fields", [{}, WHOLE], ids=["vectors of low rank", "whole queries"])
@of_latent
def test_a_head_and_value_dimensions_go_with_their_rows(name: str, fields: dict[str, Any]) -> None:
    """By hand: the rows of keys and values lie in one layer, head by head, keys first."""
    model, other = (ALL_MODELS[name](**fields) for _ in range(2))
    decoder, config = Decoder(model), model.config
    plain, values, width = config.qk_nope_head_dim, config.v_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
    query = "q_b_proj" if config.q_lora_rank else "q_proj"
    before: dict[str, Tensor] = {
        path: layer.weight.detach().clone() for path, layer in other.model.layers[1].self_attn.named_children()
    }
    narrow(decoder, 1, Values(), 10)
    narrow(decoder, 1, KvGroups(), 3)
    after = {path: layer.weight for path, layer in model.model.layers[1].self_attn.named_children()}
    assert torch.equal(after[query], before[query][: 3 * width])
    both = before["kv_b_proj"].unflatten(0, (4, plain + values))[:3, : plain + 10]
    assert torch.equal(after["kv_b_proj"], both.flatten(0, 1))
    assert torch.equal(after["o_proj"], before["o_proj"].unflatten(1, (4, values))[:, :3, :10].flatten(1))
    for path in set(before) - {query, "kv_b_proj", "o_proj"}:
        assert torch.equal(after[path], before[path])
    shape = decoder.shape(1)
    assert (shape.kv_heads, shape.value_dim) == (3, 10)
    assert decoder.weights_of(shape) == sum(decoder.layer(1, path).weight.numel() for path in decoder.paths(1))


@pytest.mark.parametrize("fields", [{}, WHOLE], ids=["vectors of low rank", "whole queries"])
@of_latent
def test_an_uneven_folder_answers_and_generates_as_the_model_does(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = mixed(ALL_MODELS[name](num_hidden_layers=4, **fields))
    save_model(model, tmp_path / "out", check_tokens=TOKENS)
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(again, use_cache=False) == generated(model)


@of_latent
def test_single_weights_of_every_layer_go_and_the_folder_is_stock(name: str, tmp_path: Path) -> None:
    check_layers_get_sparse(ALL_MODELS[name](), tmp_path / "out", logits)
