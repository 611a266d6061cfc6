"""Records with images: what enters the layers of a language part is what the stock model's own forward gives them."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from optprune.calibration import Change, Probe, Stream, calibrating, collect_metrics, first_inputs, from_text, sampled
from optprune.calibration.moments_pass import collect
from optprune.models import ImageFeatures, LoadedModel, image_features, load_model, open_model, vision_folder
from optprune.models.images import ADDED
from optprune.texts import read_records
from tests.helpers.image_records import FAMILIES, inputs_of_stock, save_with_processor, write_records
from tests.helpers.tiny_vision import save_vision, stock, tiny_vision, with_image

EPSILON = torch.finfo(torch.float32).eps
READ = ("gemma3", "gemma4", "gemma4, seen together", "llava", "mistral3", "qwen3_vl")
"""the families whose images are read"""
TAPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
Inputs = list[Mapping[str, Any]]


@pytest.fixture(params=READ)
def given(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Inputs]:
    """A folder, and what its processor makes of records, where that needs no torchvision."""
    family, _, together = request.param.partition(", ")
    if family not in FAMILIES:
        text = {"use_bidirectional_attention": "vision"} if together else {}
        folder = save_vision(tiny_vision(family, **text), tmp_path / "model")
        return folder, [with_image(stock(folder).config, seed) for seed in range(3)]
    folder = save_with_processor(family, tmp_path / "model")
    processor, records = AutoProcessor.from_pretrained(folder), read_records(write_records(tmp_path / "data", 5))
    return folder, [record.inputs(processor) for record in records]


def read(folder: Path, inputs: Inputs, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ImageFeatures]:
    whole = vision_folder(str(folder))
    assert whole is not None
    return image_features(whole, iter(inputs), dtype=dtype, device=torch.device("cpu"))


def grams(loaded: LoadedModel, batches: list[Tensor]) -> dict[str, Tensor]:
    """E[x x^T] of the inputs of some layers, gathered block by block."""
    decoder, found = loaded.decoder(), dict[str, Tensor]()
    with calibrating(decoder):
        stream = first_inputs(decoder, batches)
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                after = stream.copy()
                moments = collect(block, stream, TAPS, output=after).moments
            stream = Stream(after.hidden, stream.others, index + 1)
            for path, each in moments.items():
                found[f"layers.{index}.{path}"] = each.covariance.double() + torch.outer(each.mean, each.mean).double()
    return found


def differences(folder: Path, inputs: Inputs, loaded: LoadedModel, batches: list[Tensor]) -> list[float]:
    """How far statistics are from those of hooks in the stock model, over what rounding may make of them.

    A sum of n products has an error of at most n times the machine epsilon. What enters a layer was computed alike.
    """
    model, found = stock(folder), list[float]()
    for path, gram in grams(loaded, batches).items():
        rows = torch.cat(inputs_of_stock(model, inputs, path))
        expected = rows.T @ rows / len(rows)
        bound = 4 * (len(rows) + rows.shape[1]) * EPSILON * float(expected.diagonal().max())
        found.append(float((gram - expected).abs().max()) / bound)
    assert len(found) == 3 * len(model.model.language_model.layers)
    return found


def test_statistics_are_those_of_the_stock_model_with_its_images(given: tuple[Path, Inputs]) -> None:
    folder, inputs = given
    batches, images = read(folder, inputs)
    for loaded in (load_model(folder), open_model(folder)):
        assert max(differences(folder, inputs, replace(loaded, images=images), batches)) <= 1
    for rows, wrong in ((0 * images.rows, min), (images.rows.roll(1, 0), max)):
        other = replace(load_model(folder), images=replace(images, rows=rows))
        assert wrong(differences(folder, inputs, other, batches)) > 10


def test_the_masks_of_images_matter_where_their_tokens_see_each_other(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("gemma3"), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config, seed) for seed in range(2)]
    batches, images = read(folder, inputs)
    assert images.further is not None
    without = replace(load_model(folder), images=replace(images, further=None))
    assert max(differences(folder, inputs, without, batches)) > 10


def test_masks_belong_to_the_places_of_images(tmp_path: Path) -> None:
    """Of records of one length, and of a text."""
    folder = save_vision(tiny_vision("gemma3"), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config, seed) for seed in range(3)]
    moved = inputs[1] | {name: inputs[1][name].roll(3, 1) for name in ("input_ids", "token_type_ids")}
    batches, images = read(folder, [inputs[0], moved, inputs[2]])
    batches.append(torch.randint(3, 500, batches[0].shape))
    decoder = replace(load_model(folder), images=images).decoder()
    with calibrating(decoder):
        arguments = first_inputs(decoder, batches).others
    first, second, third, text = (blocks[0]["attention_mask"] for blocks in arguments)
    assert first is third and not torch.equal(first, second) and torch.equal(text, text.tril())


def test_deep_features_belong_to_the_record(tmp_path: Path) -> None:
    """Of records of one length, in any order, beside text."""
    folder = save_vision(tiny_vision("qwen3_vl"), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config, seed) for seed in range(3)]
    batches, images = read(folder, inputs)
    text = torch.randint(3, 490, batches[0].shape)
    decoder = replace(load_model(folder), images=images).decoder()
    with calibrating(decoder):
        every = first_inputs(decoder, [batches[2], text, batches[0], torch.cat((text, batches[1]))])
    third, alone, first, both = (blocks for blocks in every.others)
    assert images.deep is not None and len(images.deep.added) == 1
    assert torch.equal(third[0][ADDED][1], images.deep.added[0][8:]) and ADDED not in third[1]
    assert torch.equal(first[0][ADDED][1], images.deep.added[0][:4]) and ADDED not in alone[0]
    assert torch.equal(both[0][ADDED][0], torch.cat((text, batches[1])) >= images.vocabulary)
    for cos, of_text in zip(both[0]["position_embeddings"], alone[0]["position_embeddings"], strict=True):
        assert torch.equal(cos[:1], of_text) and not torch.equal(cos[1:], of_text)
    # The models of stock transformers take the whole batch too.
    stacked = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
    [expected] = inputs_of_first(stock(folder), [stacked])
    with calibrating(decoder):
        found = first_inputs(decoder, [torch.cat(batches)])
    # One batch of all records rounds otherwise than one for each.
    torch.testing.assert_close(found.hidden[0], expected)


def test_only_features_are_kept_and_the_rest_is_text(given: tuple[Path, Inputs]) -> None:
    folder, inputs = given
    batches, images = read(folder, inputs)
    token = stock(folder).config.image_token_id
    ids = torch.cat([batch[0] for batch in batches])
    assert torch.equal(ids[ids >= images.vocabulary], torch.arange(len(images.rows)) + images.vocabulary)
    for batch, each in zip(batches, inputs, strict=True):
        here = each["input_ids"] == token
        assert torch.equal(batch >= images.vocabulary, here) and torch.equal(batch[~here], each["input_ids"][~here])
    assert images.rows.untyped_storage().nbytes() == images.rows.nbytes
    assert not images.rows.requires_grad


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3", "qwen3_vl"])
def test_half_precision_is_that_of_the_stock_model(family: str, tmp_path: Path) -> None:
    """The features are those of bfloat16, also where blocks compute in float32."""
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config)]
    batches, images = read(folder, inputs, torch.bfloat16)
    loaded = replace(load_model(folder, dtype="bfloat16"), images=images)
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    [expected] = inputs_of_first(half, inputs)
    for decoder in (loaded.decoder(), loaded.decoder().precise()):
        with calibrating(decoder):
            assert torch.equal(first_inputs(decoder, batches).hidden[0], expected.to(decoder.computes_in))


def inputs_of_first(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    caught: list[Tensor] = []
    block = model.model.language_model.layers[0]
    handle = block.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        for each in inputs:
            model(**each | {"pixel_values": each["pixel_values"].to(model.dtype)})
    handle.remove()
    return caught


# -- predictions: an image is read, and not predicted


def predicting(ids: Tensor) -> Tensor:
    """The positions [batch, length] whose next token is one of a text, or the end."""
    here = ids == 500
    return ~torch.cat((here[:, 1:], torch.zeros_like(here[:, :1])), 1)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("labels", [lambda: sampled(3), lambda: from_text], ids=["sampled", "of the text"])
def test_the_metric_leaves_out_predictions_of_an_image(labels: Any, family: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config, seed) for seed in range(2)]
    batches, images = read(folder, inputs)
    found = collect_metrics(replace(load_model(folder), images=images).decoder(), batches, labels())
    model, draw, path = stock(folder), labels(), "layers.0.mlp.down_proj"
    outputs: list[Tensor] = []
    layer = model.model.language_model.get_submodule(path)
    layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    total, tokens = torch.zeros(64, dtype=torch.float64), 0
    for each in inputs:
        ids, logits = each["input_ids"], model(**each).logits[0]
        following = torch.cat((ids[0, 1:], torch.tensor([-100])))
        wanted = draw(logits.detach(), following)
        counts = predicting(ids)[0] & (wanted != -100)
        loss = -logits.log_softmax(-1)[counts].gather(1, wanted[counts][:, None]).sum()
        [gradient] = torch.autograd.grad(loss, outputs.pop())
        total, tokens = total + gradient[0].double().square().sum(0), tokens + ids.numel()
    # Gradients pass the head, a norm and no more than two blocks of at most 512 products each.
    assert (found[f"model.{path}"].average - total / tokens).abs().max() <= 8 * 512 * EPSILON * (total / tokens).max()


def test_the_divergence_leaves_out_predictions_of_an_image(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    inputs: Inputs = [with_image(stock(folder).config, seed) for seed in range(2)]
    batches, images = read(folder, inputs)
    decoder = replace(load_model(folder), images=images).decoder()
    layer = decoder.layer(0, "mlp.down_proj")
    half = layer.weight.detach() * (torch.arange(128) % 2)
    with calibrating(decoder):
        probe = Probe(decoder, batches)
        for index in range(2):
            if index == 0:
                probe.try_out([Change(layer, half, None)])
            probe.advance()
        [found] = probe.divergences()
    dense, changed = stock(folder).double(), copy.deepcopy(stock(folder)).double()
    changed.model.language_model.layers[0].mlp.down_proj.weight.data.copy_(half)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for each in inputs:
            given: Any = each | {"pixel_values": each["pixel_values"].double()}
            log_p, log_q = (model(**given).logits.log_softmax(-1) for model in (dense, changed))
            terms = (log_p.exp() * (log_p - log_q)).sum(-1)[predicting(each["input_ids"])]
            total, tokens = total + float(terms.sum()), tokens + len(terms)
    assert found == pytest.approx(total / tokens, rel=1e-3)
