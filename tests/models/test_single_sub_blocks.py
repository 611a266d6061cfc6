"""Blocks of one norm and one sub-block each: their kinds, removal, names in files, options and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import optprune
from optprune import Allocation
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import BlockShape, Decoder, Mlp, Values, open_model
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.report.block_values import is_attention, removed_with
from tests.helpers.mixed_models import generated, mixed, narrow
from tests.helpers.programs import program_of
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

NAME = "nemotron_h"
KINDS = ["linear_attention", "mlp", "full_attention", "moe"]
SHAPES = [
    BlockShape(0, 0, 0, recurrent=2),
    BlockShape(128, 0, 0),
    BlockShape(0, 2, 24),
    BlockShape(48, 0, 0, experts=4),
]
PARTS = ["recurrent", "mlp", "attention", "mlp"]
LAST = ["mixer.out_proj", "mixer.down_proj", "mixer.o_proj", "down_proj"]
TOKENS = torch.arange(10, 58)[None]


def made(**fields: Any) -> PreTrainedModel:
    """Return a model of a block of each kind."""
    return ALL_MODELS[NAME](**fields)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": TOKENS, "use_cache": False} | inputs)).logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_a_block_has_the_one_sub_block_whose_layers_it_has() -> None:
    decoder = Decoder(made())
    assert decoder.model.config.layer_types == KINDS and list(decoder.shapes()) == SHAPES
    for block, shape in enumerate(SHAPES):
        assert shape.parts == (PARTS[block],) and BlockShape(**shape.counts()) == shape
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())
        assert len(Mlp().layers(decoder, block)) == [0, 1, 0, 4][block]
        assert len(Values().layers(decoder, block)) == [0, 0, 1, 0][block]


@pytest.mark.parametrize("block", range(4), ids=KINDS)
def test_removing_a_sub_block_equals_zeroing_its_last_layers(block: int) -> None:
    removed, zeroed = made(), made()
    decoder, other, before = Decoder(removed), Decoder(zeroed), logits(made())
    with torch.no_grad():
        for path in other.paths(block):
            if path.endswith(LAST[block]):
                other.layer(block, path).weight.zero_()
    for part in {"attention", "recurrent", "mlp"} - {PARTS[block]}:
        decoder.remove(block, part)  # which it has not
    assert decoder.shapes() == Decoder(made()).shapes()
    with decoder.without([(block, PARTS[block])]):
        inside = logits(removed)
    assert apart(logits(removed), before) <= 1e-5
    decoder.remove(block, PARTS[block])
    assert torch.equal(logits(removed), inside) and decoder.shape(block) == BlockShape(0, 0, 0)
    assert apart(inside, logits(zeroed)) <= 1e-6 and apart(inside, before) > 1e-2


@pytest.mark.parametrize("block", [0, 1, 3], ids=["linear_attention", "mlp", "moe"])
def test_a_block_goes_with_its_kind_in_the_config(block: int, tmp_path: Path) -> None:
    """The first block has a state: transformers 5.25 generates from no model whose first is an MLP."""
    kinds = ["full_attention", *KINDS, "moe"]
    model = made(num_hidden_layers=3, layer_types=kinds)
    before = logits(model)
    decoder = Decoder(model)
    decoder.remove(block + 1, PARTS[block])
    decoder.record_shapes()
    assert model.config.layer_types == [kind for index, kind in enumerate(kinds) if index != block + 1]
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and apart(logits(again), before) > 1e-2
    assert generated(again) == generated(again, use_cache=False) == generated(model)


def test_a_run_by_depth_removes_blocks_of_every_kind_and_tells_which(tmp_path: Path) -> None:
    model = made(num_hidden_layers=4)
    before = Decoder(model).shapes()
    report = prune(model, batches(), load_recipe("depth", {"sparsity": 0.5, "allocation.score": "influence"}))
    gone = {part.block: part.part for part in report.removed}
    assert gone and all(before[block].parts == (part,) for block, part in gone.items())
    for path, part in (("mixer.q_proj", "attention"), ("mixer.in_proj", "recurrent"), ("mixer.up_proj", "mlp")):
        assert is_attention(path) == (part != "mlp")
        assert removed_with(report, path) == sorted(block for block, each in gone.items() if each == part)
    assert save_model(model, tmp_path / "out").stock
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_files_name_the_model_as_transformers_does(tmp_path: Path) -> None:
    """In a stock folder it has another name than in the model; either is read."""
    stock, uneven = made(), mixed(made(num_hidden_layers=4))
    for model, root in ((stock, "backbone"), (uneven, "model")):
        model.save_pretrained(tmp_path / f"{root} theirs")
        save_model(model, tmp_path / root)
        tensors = load_file(tmp_path / root / "model.safetensors")
        assert tensors.keys() == load_file(tmp_path / f"{root} theirs" / "model.safetensors").keys()
        assert {name.partition(".")[0] for name in tensors} == {root, "lm_head"}
        other = {"backbone": "model", "model": "backbone"}[root]
        renamed = {name.replace(f"{root}.", f"{other}.", 1): weight for name, weight in tensors.items()}
        save_file(renamed, tmp_path / root / "model.safetensors", {"format": "pt"})
        streamed = open_model(tmp_path / root)
        decoder, whole = streamed.decoder(), Decoder(model)
        for block in range(len(decoder.blocks)):
            with decoder.resident(block):
                for name, weight in decoder.weights(block).items():
                    assert torch.equal(weight, whole.weights(block)[name])


@pytest.mark.parametrize("recipe", ["structured_best", "experts_best", "depth"])
def test_streamed_and_resumed_runs_give_the_same_weights(recipe: str, tmp_path: Path) -> None:
    settings = {
        # The folder must be stock, as this check loads it.
        "structured_best": {"units": "mlp", "sparsity": 0.2, "allocation": "uniform"},
        "experts_best": {"sparsity": 0.1},
        "depth": {"sparsity": 0.3},
    }
    check_every_way_gives_the_same(NAME, load_recipe(recipe, settings[recipe]), tmp_path, shared=False)


def test_an_uneven_folder_answers_as_the_stock_class_with_zeros(tmp_path: Path) -> None:
    """Value dimensions and units of one block of each kind are gone, and by hand the columns that read them."""
    fields = {"num_hidden_layers": 4, "layer_types": KINDS * 2}
    model, zeroed = made(**fields), made(**fields)
    decoder, other = Decoder(model), Decoder(zeroed)
    for block, units, count in ((2, Values(), 10), (1, Mlp(), 100), (3, Mlp(), 40)):
        for layers in units.layers(other, block):
            channels = layers.channels
            place = torch.arange(channels.units) % (channels.units // channels.slot_count)
            layer = other.layer(block, layers.consumer)
            with torch.no_grad():
                layer.weight.mul_(channels.column_mask(place < count, layer.in_features))
        narrow(decoder, block, units, count)
    decoder.record_shapes()
    assert not save_model(model, tmp_path / "out").stock
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model))
    dense = logits(made(**fields))
    assert apart(logits(again), logits(zeroed)) <= 1e-5 and apart(logits(again), dense) > 1e-2
    assert generated(again) == generated(again, use_cache=False) == generated(zeroed)


@pytest.mark.parametrize(("units", "kind"), [("kv-groups", 2), ("mlp", 3), ("experts", 3)])
def test_a_plan_stands_on_a_block_that_the_recipe_prunes(units: str, kind: int) -> None:
    """The largest of them, which need not be the largest of all: that has experts, and no heads."""
    recipe = "experts_best" if units == "experts" else "fasp"
    program = program_of(recipe, decoder=Decoder(made()), fields={"units": units, "sparsity": 0.1})
    assert program.largest == kind and program.example.solves


def test_plain_transformers_takes_fewer_blocks_and_narrower_mlps() -> None:
    decoder, target = Decoder(made().to("meta")), RUNTIMES["transformers"]  # type: ignore[arg-type]
    experts = load_recipe("experts_best", {"sparsity": 0.1})
    for recipe in (Recipe(units="mlp", sparsity=0.1), load_recipe("depth"), experts):
        assert target.fitted(recipe, decoder) == (recipe, ())
    blocks = [shape.counts() for shape in (SHAPES[0], BlockShape(0, 0, 0), *SHAPES[2:])]
    target.fitted(load_recipe("fasp"), decoder, Allocation.from_dict({"sparsity": 0.2, "blocks": blocks}))
    with pytest.raises(InputError, match="heads with fewer value dimensions"):
        target.fitted(Recipe(units="vo", sparsity=0.02), decoder)


OPTIONS: dict[str, dict[str, Any]] = {
    "biases": {"mlp_bias": True, "use_bias": True},
    "another activation": {"mlp_hidden_act": "silu", "mamba_hidden_act": "gelu"},
    "weights of the experts that do not add up": {"norm_topk_prob": False},
    "a convolution without bias": {"use_conv_bias": False},
    "tied embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_config(fields: dict[str, Any], tmp_path: Path) -> None:
    model, dense = made(**fields), made(**fields)
    shapes = list(Decoder(model).shapes())
    shapes[1:] = [
        replace(shape, **fewer)
        for shape, fewer in zip(
            shapes[1:], ({"mlp_width": 96}, {"value_dim": 16}, {"experts": 3, "mlp_width": 40}), strict=True
        )
    ]
    allocation = Allocation.from_dict({"sparsity": 0.1, "blocks": [shape.counts() for shape in shapes]})
    prune(model, batches(), load_recipe("fasp"), allocation=allocation)
    assert not save_model(model, tmp_path / "out").stock
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and apart(logits(model), logits(dense)) > 1e-3
    assert list(Decoder(again).shapes()) == shapes and generated(again) == generated(again, use_cache=False)


def test_a_config_of_earlier_checkpoints_is_read(tmp_path: Path) -> None:
    """The kinds of the blocks are letters there, and tensors that predict further tokens are left out."""
    model = made()
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    fields = json.loads(file.read_text())
    del fields["layers_block_type"]
    file.write_text(json.dumps({**fields, "hybrid_override_pattern": "M-*E", "num_hidden_layers": 4}))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        {**tensors, "mtp.layers.0.eh_proj.weight": torch.ones(2, 2)},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    streamed = open_model(tmp_path / "model")
    assert list(streamed.decoder().shapes()) == SHAPES
    assert torch.equal(logits(optprune.load_model(tmp_path / "model", device="cpu").model), logits(model))


def test_experts_of_a_narrower_space_are_refused(tmp_path: Path) -> None:
    made(moe_latent_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="has moe_latent_size 32, which is not supported for a nemotron_h model"):
        optprune.load_model(tmp_path / "model")


def test_experts_of_groups_of_equal_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"this nemotron_h model chooses among 2 groups of equal size \(n_group\)"):
        prune(made(n_group=2, topk_group=1), batches(), load_recipe("experts_best"))


def test_a_model_without_experts_has_none_to_remove() -> None:
    model = made(layer_types=KINDS[:3])
    with pytest.raises(InputError, match="units experts need a router, and no block of this nemotron_h model has one"):
        prune(model, batches(), load_recipe("experts_best"))
