"""Models whose blocks differ in shape, and what they write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optprune.export import save_model
from optprune.models import (
    Decoder,
    KvGroups,
    LinkedUnits,
    LoadedModel,
    Mlp,
    Pairs,
    RecurrentHeads,
    Values,
    load_model,
)
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import SINGLE
from tests.helpers.token_batches import batches

PROMPT = torch.arange(10, 20)[None]


def mixer_first(family: str) -> dict[str, list[str]]:
    """Return the config's fields by which two mixers come first in a family of single sub-blocks, and {} in any other.

    transformers 5.25 generates from no model whose first block is an MLP, as is when the only mixer before it is gone.
    """
    kinds = SINGLE.get(family)
    return {"layer_types": [kinds[0], kinds[2], kinds[1], *kinds[3:]]} if kinds else {}


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """Four blocks, or mixers and MLPs: no mixer, all that can be narrower, no MLP, intact.

    The last recurrent mixer has fewer heads where it can.
    """
    decoder = Decoder(model)
    stays = decoder.architecture.indivisible
    first, second = (block_with(decoder, number, "attention") for number in (0, 1))
    mlps = [block_with(decoder, number, "mlp") for number in range(3)]
    decoder.remove(first, decoder.shape(first).parts[0])
    if "kv_heads" not in stays:
        [groups] = KvGroups().layers(decoder, second)
        decoder.keep_units(second, groups, torch.arange(groups.channels.units) >= 1)
    if "value_dim" not in stays:
        [values] = Values().layers(decoder, second)
        decoder.keep_units(second, values, torch.arange(values.channels.units) % 16 < 5)
    if decoder.architecture.pairs_kept_by_head:
        [pairs] = Pairs().within(decoder).layers(decoder, second)
        decoder.keep_units(second, pairs, (torch.arange(pairs.channels.units) + pairs.channels.slots) % 8 < 5)
    recurrent = [index for index, shape in enumerate(decoder.shapes()) if shape.recurrent > 1]
    if recurrent and "recurrent" not in stays:
        [heads] = RecurrentHeads().layers(decoder, recurrent[-1])
        decoder.keep_units(recurrent[-1], heads, torch.arange(heads.channels.units) >= 1)
    mixture = decoder.architecture.mixture is not None
    for mlp in Mlp().layers(decoder, mlps[1]):
        decoder.keep_units(mlps[1], mlp, torch.arange(mlp.channels.units) < (40 if mixture else 50))
    if mixture:
        decoder.keep_experts(mlps[1], torch.tensor([True, False, True, True]))
    decoder.remove(mlps[2], "mlp")
    decoder.record_shapes()
    return model


def check_layers_get_sparse(model: PreTrainedModel, folder: Path, logits: Callable[[Any], torch.Tensor]) -> None:
    """Half of the weights of every layer go, and the folder is that of the stock class."""
    report = prune(model, batches(), load_recipe("sparsegpt", {"sparsity": 0.5}))
    decoder = Decoder(model)
    places = [(block, path) for block in range(len(decoder.blocks)) for path in decoder.paths(block)]
    assert {layer.name for layer in report.layers} == {decoder.name(*place) for place in places}
    for place in places:
        assert float((decoder.layer(*place).weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    decoder.joined()
    assert save_model(model, folder).stock
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


def check_uneven_folder(
    model: PreTrainedModel, folder: Path, tokens: torch.Tensor, logits: Callable[[Any], torch.Tensor]
) -> LoadedModel:
    """A folder of blocks that differ is read with the same shapes and logits, writes with a cache, and is trained."""
    assert not save_model(model, folder, check_tokens=tokens).stock
    again = load_model(folder, device="cpu")
    assert again.decoder().shapes() == Decoder(model).shapes()
    again.decoder().joined()
    Decoder(model).joined()
    torch.testing.assert_close(logits(again.model), logits(model), rtol=1e-5, atol=1e-5)
    assert generated(model) == generated(model, use_cache=False)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    return again


def narrow(decoder: Decoder, block: int, units: LinkedUnits, count: int) -> None:
    """Leave the first so many units of every slot in each layer of a block whose columns they are."""
    for layers in units.layers(decoder, block):
        decoder.keep_units(block, layers, layers.channels.first(count))


def generated(model: PreTrainedModel, *, use_cache: bool = True) -> list[int]:
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False, use_cache=use_cache
    )[0].tolist()
