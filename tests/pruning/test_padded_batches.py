"""Padded batches have the statistics of the tokens alone, as transformers' own masks and positions give them."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import optprune
from optprune.allocation import Allocation
from optprune.errors import InputError
from tests.helpers.short_runs import batches, same
from tests.helpers.tiny_models import tiny_llama, tiny_opt

LENGTHS = (24, 17, 9, 24)
NAMES = {"llama": "model.layers.1.mlp.down_proj", "opt": "model.decoder.layers.1.fc2"}


def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 500, (1, length), generator=generator) for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    ids, mask = torch.full((4, 24), 2), torch.zeros(4, 24, dtype=torch.long)
    for row, window in enumerate(windows()):
        place = slice(24 - window.shape[1], 24) if side == "left" else slice(0, window.shape[1])
        ids[row, place], mask[row, place] = window[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def by_transformers(model: PreTrainedModel, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The mean products of a layer's inputs over the tokens of a batch, by the model's own mask and positions."""
    caught = list[Tensor]()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    mask = batch["attention_mask"]
    with torch.no_grad():
        model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    handle.remove()
    inputs = caught[0].reshape(-1, caught[0].shape[-1])[mask.flatten().bool()].double()
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_padded_tokens_count_in_no_moment(family: str, side: str) -> None:
    model = tiny_llama() if family == "llama" else tiny_opt()
    name, batch = NAMES[family], padded(side)
    moments = optprune.layer_loss(model, [batch], name).moments
    alone = optprune.layer_loss(model, windows(), name).moments
    assert torch.equal(moments.gram, alone.gram)
    assert torch.equal(moments.mean, alone.mean)
    expected = by_transformers(model, name, batch)
    scale = expected.abs().max()
    assert (moments.gram.double() - expected).abs().max() < 1e-5 * scale
    whole = optprune.layer_loss(model, [batch["input_ids"]], name).moments
    assert (whole.gram.double() - expected).abs().max() > 1e-2 * scale


def test_a_loader_prunes_as_its_windows_do() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    rows = [{name: value[row] for name, value in padded("right").items()} for row in range(4)]
    loader: DataLoader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    first = optprune.prune(ours, loader, "structured_best", sparsity=0.3)
    second = optprune.prune(theirs, windows(), optprune.load_recipe("structured_best", {"sparsity": 0.3}))
    assert first.tokens == second.tokens == sum(LENGTHS)
    assert same(ours, theirs)


def test_a_recipe_is_given_by_name_with_its_fields() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    more = {"allocation.multiple": 4}
    report = optprune.prune(ours, batches(), "fasp", sparsity=0.3, units="mlp", allocation="uniform", **more)
    optprune.prune(theirs, batches(), optprune.load_recipe("fasp", {"sparsity": 0.3, "units": "mlp"} | more))
    assert same(ours, theirs)
    assert report.recipe["allocation"] == {"kind": "uniform", "multiple": 4}
    assert report.sparsity_requested == 0.3
    given = Allocation.from_dict(report.allocation)
    again = tiny_llama()
    optprune.prune(again, batches(), "fasp", units="mlp", allocation=given)
    assert same(again, theirs)


def test_fields_of_a_recipe_object_are_replaced_too() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    optprune.prune(ours, batches(), optprune.load_recipe("wanda"), sparsity=0.4)
    optprune.prune(theirs, batches(), "wanda", sparsity=0.4)
    assert same(ours, theirs)


@pytest.mark.parametrize(
    ("model", "recipe", "fields", "reason"),
    [
        (None, "fsap", {}, r"the recipe 'fsap' is not known \(did you mean spap"),
        (None, "fasp", {"sparsty": 0.2}, r"a recipe has no field 'sparsty' \(did you mean sparsity\?\)"),
        (None, "fasp", {"sparsity": 2}, "the recipe field 'sparsity' cannot be 2"),
        (None, 7, {}, "the recipe cannot be 7: give a name"),
        (nn.Linear(4, 4), "fasp", {}, "the model cannot be of type Linear: give a model of transformers"),
        ("folder", "fasp", {}, "the model cannot be 'folder': give the model itself"),
    ],
)
def test_wrong_kinds_get_a_sentence(model: object, recipe: object, fields: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        optprune.prune(tiny_llama() if model is None else model, batches(), recipe, **fields)  # type: ignore[arg-type]
