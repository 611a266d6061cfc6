"""Blocks with attention and a recurrent mixer side by side: removal of one or both, caches, scores and multipliers."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import optprune
from optprune.export import save_model
from optprune.measure import perplexity
from optprune.models import BlockShape, Decoder
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.mixed_models import generated
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches

NAME = "falcon_h1"
LAST = {"attention": "self_attn.o_proj", "recurrent": "mamba.out_proj", "mlp": "feed_forward.down_proj"}
TOKENS = torch.arange(10, 58)[None]
MULTIPLIERS: dict[str, Any] = {
    **{"embedding_multiplier": 1.0, "lm_head_multiplier": 1.0, "key_multiplier": 1.0},
    **{"attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "ssm_in_multiplier": 1.0},
    **{"ssm_out_multiplier": 1.0, "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5},
}


def made(**fields: Any) -> PreTrainedModel:
    return ALL_MODELS[NAME](num_hidden_layers=4, **fields)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": TOKENS, "use_cache": False} | inputs)).logits


def silenced(model: PreTrainedModel, gone: list[tuple[int, str]]) -> PreTrainedModel:
    """Return a model of the stock class whose sub-blocks add nothing, because their last layers are zero."""
    decoder = Decoder(model)
    with torch.no_grad():
        for block, part in gone:
            for parameter in decoder.layer(block, LAST[part]).parameters():
                parameter.zero_()
    return model


def without(model: PreTrainedModel, gone: list[tuple[int, str]]) -> PreTrainedModel:
    decoder = Decoder(model)
    for block, part in gone:
        decoder.remove(block, part)
    decoder.record_shapes()
    return model


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_a_block_has_both_mixers() -> None:
    decoder = Decoder(made())
    for block, shape in enumerate(decoder.shapes()):
        assert shape == BlockShape(128, 2, 24, recurrent=2) and BlockShape(**shape.counts()) == shape
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())


def test_a_width_that_no_field_names_is_that_of_the_hidden_size() -> None:
    decoder = Decoder(made(mamba_d_ssm=None, mamba_rms_norm=False, projectors_bias=True))
    sizes = decoder.layer_sizes(decoder.shape(0))
    assert sizes["mamba.out_proj"] == (64, 128) == decoder.layer(0, "mamba.out_proj").weight.shape
    assert sizes["mamba.in_proj"] == decoder.layer(0, "mamba.in_proj").weight.shape


@pytest.mark.parametrize(
    "order", [each for count in (1, 2) for each in permutations(["attention", "recurrent"], count)]
)
def test_the_norm_goes_with_the_last_mixer_that_reads_it(order: tuple[str, ...]) -> None:
    model, gone = made(), [(2, part) for part in order]
    decoder = Decoder(model)
    for count, (block, part) in enumerate(gone, 1):
        decoder.remove(block, part)
        assert (decoder.blocks[2].input_layernorm is None) == (count == 2)
        assert apart(logits(model), logits(silenced(made(), gone[:count]))) <= 1e-6
    assert decoder.shape(2).parts == tuple(part for part in ("attention", "recurrent", "mlp") if part not in order)


@pytest.mark.parametrize(
    "gone",
    [
        [(0, "attention")],
        [(0, "recurrent")],
        [(0, "attention"), (1, "recurrent"), (2, "mlp")],
        [(0, "attention"), (0, "recurrent"), (3, "attention")],
        [(1, "attention"), (1, "recurrent"), (1, "mlp"), (2, "attention")],
        [(block, "recurrent") for block in range(4)],
    ],
)
def test_a_folder_without_some_mixers_answers_as_the_stock_class_with_zeros(
    gone: list[tuple[int, str]], tmp_path: Path
) -> None:
    model, zeroed = without(made(), gone), silenced(made(), gone)
    assert not save_model(model, tmp_path / "out").stock
    whole = torch.cat([TOKENS, TOKENS[:, :3] + 7], 1)
    expected = logits(zeroed, input_ids=whole)
    for each in (model, optprune.load_model(tmp_path / "out", device="cpu").model):
        assert apart(logits(each), logits(zeroed)) <= 1e-5
        assert generated(each) == generated(each, use_cache=False) == generated(zeroed)
        with torch.no_grad():
            cache = each(TOKENS, use_cache=True).past_key_values
            assert cache.get_seq_length() == TOKENS.shape[1]
            step = each(TOKENS[:, :3] + 7, cache=cache).logits
        assert apart(step, expected[:, -3:]) <= 1e-5


def test_blocks_without_anything_are_dropped_and_the_rest_is_stock(tmp_path: Path) -> None:
    gone = [(1, part) for part in LAST]
    model = without(made(), gone)
    assert save_model(model, tmp_path / "out").stock and model.config.num_hidden_layers == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert apart(logits(again), logits(silenced(made(), gone))) <= 1e-5
    assert generated(again) == generated(model, use_cache=False)


@pytest.mark.parametrize("field", MULTIPLIERS)
def test_every_multiplier_counts_in_folders_too(field: str, tmp_path: Path) -> None:
    """The tiny model has all of them, and a model with one of them off answers otherwise in the same way."""
    gone = [(0, "recurrent"), (1, "attention")]
    zeroed = silenced(made(**{field: MULTIPLIERS[field]}), gone)
    save_model(without(made(**{field: MULTIPLIERS[field]}), gone), tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert apart(logits(again), logits(zeroed)) <= 1e-5
    assert apart(logits(again), logits(silenced(made(), gone))) > 1e-3


def test_depth_scores_each_mixer_by_itself() -> None:
    """By hand: 1 - cos of the states before and behind a sub-block, without what stands behind it or beside it."""
    report = prune(made(), batches(), load_recipe("depth", {"sparsity": 0.7, "allocation.score": "influence"}))
    assert {part.part for part in report.removed} == set(LAST)
    for entry in report.removed:
        others = [(entry.block, part) for part in LAST if part != entry.part]
        if entry.part == "mlp":
            before, after = states_behind(entry.block, [(entry.block, "mlp")]), states_behind(entry.block, [])
        else:
            before = states_behind(entry.block, [*others, (entry.block, entry.part)])
            after = states_behind(entry.block, others)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        assert entry.score == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def test_depth_measures_the_perplexity_without_each_mixer() -> None:
    recipe = load_recipe("depth", {"sparsity": 0.15, "allocation.score_tokens": 96})
    entry = prune(made(), batches(), recipe).removed[0]
    found = perplexity(silenced(made(), [(entry.block, entry.part)]), torch.cat(batches())[:2]).perplexity
    assert entry.score == pytest.approx(found, rel=1e-5)


def states_behind(block: int, gone: list[tuple[int, str]]) -> Tensor:
    """Return the states behind a block of a model without some sub-blocks, for all calibration tokens."""
    model, caught = silenced(made(), gone), list[Tensor]()
    layer = model.get_submodule(f"model.layers.{block}")
    layer.register_forward_hook(lambda _, __, output: caught.append(output[0].double().reshape(-1, 64)))
    for batch in batches():
        logits(model, input_ids=batch)
    return torch.cat(caught)
