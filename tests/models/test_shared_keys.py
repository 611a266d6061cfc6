"""Gemma 4: blocks with heads of other sizes, which hand keys and values on to later ones, and inputs of each token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedModel

import optprune
from optprune import Allocation
from optprune.allocation.allocation import everything
from optprune.calibration import advance, calibrating, first_inputs
from optprune.calibration.carried import carried, carried_width
from optprune.errors import InputError
from optprune.export import OnnxFolder, export, save_model
from optprune.healing import HealingSettings, heal
from optprune.models import (
    BlockAllocation,
    BlockShape,
    Decoder,
    KvGroups,
    Mlp,
    Values,
    load_config,
    load_model,
    open_model,
)
from optprune.models.skeleton import one_block_model
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.pruning.measured_plan import BlockProbe
from optprune.recipe import Recipe, load_recipe
from optprune.tokens.rows import TokenRows
from tests.helpers.layer_inputs import check_wanda
from tests.helpers.mixed_models import check_layers_get_sparse, generated, narrow
from tests.helpers.programs import program_of
from tests.helpers.streams import logits_block_by_block
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

NEAR, FAR = "sliding_attention", "full_attention"
TOKENS = torch.arange(10, 58)[None]
VARIANTS: dict[str, dict[str, Any]] = {
    "the last blocks read keys and values of both kinds": {
        **{"layer_types": [NEAR, NEAR, FAR, NEAR, FAR], "num_kv_shared_layers": 2, "num_hidden_layers": 5},
    },
    "keys are values": {
        **{"layer_types": [NEAR, NEAR, FAR, FAR], "num_kv_shared_layers": 0, "attention_k_eq_v": True},
        **{"num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False},
    },
}
SHARING, EQUAL = VARIANTS
by_variant = pytest.mark.parametrize("variant", VARIANTS)
ROUNDING = 5e-5
"""a few roundings of float32 (6e-8), of states that scalars of some 0.02 shrink in each block before norms"""
LAST = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def made(variant: str = SHARING, **fields: Any) -> PreTrainedModel:
    return ALL_MODELS["gemma4_text"](**VARIANTS[variant], **fields)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def silenced(model: PreTrainedModel, gone: list[tuple[int, str]]) -> PreTrainedModel:
    """Return a model of the stock class whose sub-blocks add nothing, because their last layers are zero."""
    for block, part in gone:
        torch.nn.init.zeros_(model.get_submodule(f"model.layers.{block}.{LAST[part]}").weight)
    return model


def test_shapes_say_which_layers_an_attention_lacks() -> None:
    assert Decoder(made()).shapes() == (
        *(BlockShape(128, 2, 16), BlockShape(128, 2, 16), BlockShape(128, 2, 32)),
        *(BlockShape(256, 2, 16, lacking=2), BlockShape(256, 2, 32, lacking=2)),
    )
    assert Decoder(made(EQUAL)).shapes() == (*[BlockShape(128, 2, 16)] * 2, *[BlockShape(128, 1, 32, lacking=1)] * 2)


@by_variant
def test_the_layers_of_a_shape_are_those_of_its_block(variant: str) -> None:
    decoder = Decoder(made(variant))
    for block, shape in enumerate(decoder.shapes()):
        assert BlockShape(**shape.counts()) == shape
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert sizes == {path: tuple(decoder.layer(block, path).weight.shape) for path in decoder.paths(block)}
        left = decoder.layer_sizes(shape.without("attention").without("mlp"))
        beside = {path for path, size in left.items() if all(size)}
        assert beside == {path for path in decoder.paths(block) if path.startswith("per_layer")}
    named = dict(decoder.model.named_parameters())
    assert decoder.linear_weights() == sum(
        weight.numel() for name, weight in named.items() if ".layers." in name and weight.ndim > 1
    )


@pytest.mark.parametrize("block", [0, 3, 4])
def test_fewer_units_equal_zeroed_columns_in_wide_blocks_too(block: int) -> None:
    sliced, zeroed = made(), made()
    decoder = Decoder(sliced)
    narrow(decoder, block, Mlp(), 40)
    decoder.record_shapes()
    with torch.no_grad():
        zeroed.get_submodule(f"model.layers.{block}.mlp.down_proj").weight[:, 40:] = 0
    assert apart(logits(sliced), logits(zeroed)) <= ROUNDING


@by_variant
def test_a_norm_of_the_values_and_shared_heads_are_named_in_refusals(variant: str) -> None:
    decoder = Decoder(made(variant))
    with pytest.raises(InputError, match=r"^units vo remove value_dim, but gemma4_text .*: a norm .* --units mlp$"):
        Values().check_possible(decoder)
    why = "blocks have heads of other sizes" if variant == SHARING else "blocks without a window have heads of another"
    with pytest.raises(InputError, match=rf"^units kv-groups .* all or none of them: {why}"):
        KvGroups().check_possible(decoder)
    with pytest.raises(InputError, match=r"^units rotated-vo remove value_dim"):
        program_of("structured_best", decoder=decoder)


@by_variant
def test_value_dimensions_do_not_go_exactly(variant: str) -> None:
    """The reason for that: the norm of the values left changes when a value dimension becomes zero."""
    one, other, block = made(variant), made(variant), 0
    with torch.no_grad():
        one.get_submodule(f"model.layers.{block}.self_attn.v_proj").weight[3] = 0
        other.get_submodule(f"model.layers.{block}.self_attn.o_proj").weight[:, 3::16][:, :2] = 0
    assert apart(logits(one), logits(other)) > 1e-4


def test_other_computations_are_refused_by_name(tmp_path: Path) -> None:
    Gemma4TextConfig(**made().config.to_dict() | {"use_bidirectional_attention": "all"}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has use_bidirectional_attention .*, which is not supported for a"):
        load_config(tmp_path)


def test_images_may_see_both_ways_beside_text(tmp_path: Path) -> None:
    made(use_bidirectional_attention="vision").save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path).model), logits(made()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_variant
def test_a_pass_block_by_block_gives_the_logits_of_the_stock_class(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Each batch has its own keys, values and numbers of its tokens."""
    made(variant).to(dtype).save_pretrained(tmp_path)
    model = load_model(tmp_path).model
    expected = logits(model)
    assert torch.equal(logits_block_by_block(Decoder(model), TOKENS), expected)
    assert torch.equal(logits_block_by_block(open_model(tmp_path).decoder(), TOKENS), expected)


def test_layers_that_a_checkpoint_holds_and_no_block_has_are_ignored(tmp_path: Path) -> None:
    """Google's checkpoints have keys and values of blocks that read those of others."""
    made().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {f"model.layers.4.self_attn.{name}_proj.weight": torch.ones(64, 64) for name in "kv"}
    save_file(
        load_file(file) | more | {"model.layers.4.self_attn.k_norm.weight": torch.ones(32)}, file, {"format": "pt"}
    )
    expected = logits(made())
    assert torch.equal(logits(load_model(tmp_path).model), expected)
    assert torch.equal(logits_block_by_block(open_model(tmp_path).decoder(), TOKENS), expected)


@pytest.mark.parametrize("fields", [*VARIANTS.values(), {}], ids=[*VARIANTS, "only the last block reads keys"])
def test_two_batches_of_one_shape_keep_apart(fields: dict[str, Any]) -> None:
    decoder, other = Decoder(ALL_MODELS["gemma4_text"](**fields)), TOKENS.flip(1) + 3
    with calibrating(decoder):
        stream = first_inputs(decoder, [TOKENS, other])
        for block in decoder.blocks:
            advance(block, stream)
        found = [decoder.logits(hidden) for hidden in stream.hidden]
    for each, text in zip(found, (TOKENS, other), strict=True):
        with torch.no_grad():
            assert torch.equal(each, decoder.model(text, use_cache=False).logits)


def test_states_carry_what_later_blocks_need_and_no_more() -> None:
    decoder = Decoder(made())
    widths = [each.columns for each in carried(decoder)]
    # Numbers of this block's tokens and of later ones, and keys and values of 2 heads of 16 or 32 from block 1 and 2.
    assert widths == [5 * 8, 4 * 8, 3 * 8 + 64, 2 * 8 + 64 + 128, 8 + 128]
    assert carried_width(decoder) == max(widths)
    with calibrating(decoder):
        stream = first_inputs(decoder, [TOKENS])
        for block, width in zip(decoder.blocks, widths, strict=True):
            assert stream.hidden[0].shape == (1, 48, 64 + width)
            advance(block, stream)
    assert stream.hidden[0].shape == (1, 48, 64)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp": ("fasp", {"units": "mlp", "sparsity": 0.2, "propagation": "cross"}),
    "recovered": ("fasp", {"units": "mlp", "sparsity": 0.2, "refit.recovery": 1, "refit.held_out": 0.25}),
    "sparse": ("sparse_best", {}),
    "probed": ("structured_best", {"units": "mlp", "sparsity": 0.3, "allocation.probe_tokens": 50}),
    "depth": ("depth", {"sparsity": 0.3}),
}


@pytest.mark.parametrize("way", WAYS)
@by_variant
def test_streamed_and_resumed_runs_give_the_same_weights(variant: str, way: str, tmp_path: Path) -> None:
    recipe, settings = WAYS[way]
    check_every_way_gives_the_same(
        "gemma4_text", load_recipe(recipe, settings), tmp_path, shared=False, **VARIANTS[variant]
    )


@pytest.mark.e2e
def test_processes_get_what_blocks_hand_on(tmp_path: Path) -> None:
    recipe = load_recipe("sparsegpt", {"propagation": "intra"})
    check_every_way_gives_the_same("gemma4_text", recipe, tmp_path, shared=True, **VARIANTS[SHARING])


@pytest.mark.parametrize("recipe", ["structured_best", "sparse_best"])
@by_variant
def test_a_plan_measures_the_largest_block_with_its_weights_and_without(variant: str, recipe: str) -> None:
    fields = {"units": "mlp"} if recipe == "structured_best" else {}
    program = program_of(recipe, decoder=Decoder(made(variant)), fields=fields)
    alone = one_block_model(made(variant).config, torch.float32, torch.device("cpu"), program.largest)
    for model, index in ((made(variant), program.largest), (alone, 0)):
        found, wanted = Decoder(model).shape(index), program.decoder.shape(program.largest)
        assert (found.mlp_width, found.value_dim) == (wanted.mlp_width, wanted.value_dim)
        rates = BlockProbe(program, Decoder(model), batches(), index).rates()
        assert rates.passes > 0 and rates.solves > 0 and rates.budget > 0


@by_variant
def test_single_weights_of_every_layer_go_and_the_folder_is_stock(variant: str, tmp_path: Path) -> None:
    check_layers_get_sparse(made(variant), tmp_path / "out", logits)


def test_weights_of_the_inputs_of_a_block_go_by_what_its_layers_see() -> None:
    """By hand, in the first block: Wanda keeps the largest |W_ij| times the norm of input j, in every row."""
    model, dense = made(), made()
    prune(model, batches(), load_recipe("wanda", {"sparsity": 0.5}))
    for path in ("self_attn.o_proj", "per_layer_input_gate", "per_layer_projection"):
        check_wanda(model, dense, f"model.layers.0.{path}")


@by_variant
def test_blocks_that_keep_the_same_share_are_stock(variant: str, tmp_path: Path) -> None:
    """In the stock class a block that reads keys and values has an MLP twice as wide as the others."""
    model = made(variant)
    recipe = load_recipe("fasp", {"units": "mlp", "sparsity": 0.25, "allocation.multiple": 8})
    prune(model, batches(), recipe)
    wide = [1, 1, 1, 2, 2] if variant == SHARING else [1] * 4
    widths = [shape.mlp_width for shape in Decoder(model).shapes()]
    assert widths == [model.config.intermediate_size * times for times in wide] and widths[0] < 128
    Decoder(model).joined()
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(again, use_cache=False)


@by_variant
def test_an_uneven_folder_answers_and_generates_as_the_stock_class_with_zeros(variant: str, tmp_path: Path) -> None:
    gone = [(0, "attention"), (2, "mlp"), (3, "attention")] if variant == SHARING else [(0, "attention"), (2, "mlp")]
    model, zeroed = made(variant), silenced(made(variant), gone)
    decoder = Decoder(model)
    for block, part in gone:
        decoder.remove(block, part)
    narrow(decoder, 1, Mlp(), 50)
    with torch.no_grad():
        zeroed.get_submodule("model.layers.1.mlp.down_proj").weight[:, 50:] = 0
    decoder.record_shapes()
    assert not save_model(model, tmp_path / "out").stock
    longer = torch.cat([TOKENS, TOKENS[:, :3] + 7], 1)
    for each in (model, optprune.load_model(tmp_path / "out", device="cpu").model):
        assert apart(logits(each), logits(zeroed)) <= ROUNDING
        assert generated(each) == generated(each, use_cache=False) == generated(zeroed)
        with torch.no_grad():
            cache = each(TOKENS, use_cache=True).cache
            assert cache.get_seq_length() == TOKENS.shape[1]
            step, whole = each(TOKENS[:, :3] + 7, cache=cache).logits, each(longer, use_cache=False).logits
        assert apart(step, whole[:, -3:]) <= ROUNDING


@by_variant
def test_a_block_without_anything_stays_with_its_scalar_and_its_input(variant: str, tmp_path: Path) -> None:
    gone = [(0, "attention"), (0, "mlp")]
    model, zeroed = made(variant), silenced(made(variant), gone)
    decoder = Decoder(model)
    for block, part in gone:
        decoder.remove(block, part)
    decoder.record_shapes()
    assert len(decoder.blocks) == len(VARIANTS[variant]["layer_types"]) and not decoder.shape(0).parts
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and apart(logits(again), logits(zeroed)) <= ROUNDING
    entry = torch.ones(1, 3, 64)
    plain: Any = decoder.blocks[0]
    plain(entry, per_layer_input=torch.ones(1, 3, 8))
    assert torch.equal(entry, torch.ones(1, 3, 64))


@pytest.mark.parametrize("score", ["influence", "perplexity"])
@by_variant
def test_depth_leaves_the_attention_that_later_blocks_need(variant: str, score: str, tmp_path: Path) -> None:
    model = made(variant)
    needed = Decoder(model).handed_on()
    assert needed == {1, 2} if variant == SHARING else needed == {1, 3}
    with torch.no_grad():  # so that they do least
        for block in needed:
            Decoder(model).layer(block, LAST["attention"]).weight.mul_(1e-3)
    report = prune(model, batches(), load_recipe("depth", {"sparsity": 0.5, "allocation.score": score}))
    assert report.removed and not {(block, "attention") for block in needed} & {
        (part.block, part.part) for part in report.removed
    }
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and generated(again) == generated(model, use_cache=False)


def test_an_allocation_without_such_attention_is_refused() -> None:
    decoder = Decoder(made())
    blocks = list(everything(decoder).blocks)
    for index, shape, sentence in (
        (1, decoder.shape(1).without("attention"), r"^the allocation removes the attention of block 1, whose keys"),
        (3, replace(decoder.shape(3), lacking=1), r"^the allocation keeps lacking 1 in block 3, which has 2$"),
        (3, replace(decoder.shape(3), kv_heads=1), r"^the allocation keeps kv_heads 1 .*: blocks have heads of other"),
    ):
        changed = [BlockAllocation(shape) if block == index else each for block, each in enumerate(blocks)]
        with pytest.raises(InputError, match=sentence):
            Allocation.of(decoder, changed)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_influences_are_those_beside_what_the_block_does_anyway(part: str) -> None:
    """By hand: 1 - cos of the states with and without a sub-block, both behind the block's own input and scalar."""
    settings = {"sparsity": 0.1, "allocation.score": "influence", "allocation.parts": part}
    report = prune(made(), batches(), load_recipe("depth", settings))
    assert {entry.part for entry in report.removed} == {part}
    for entry in report.removed:
        other = [] if entry.part == "mlp" else [(entry.block, "mlp")]
        without, having = (
            states_behind([*other, (entry.block, entry.part)], entry.block),
            states_behind(other, entry.block),
        )
        cosine = torch.nn.functional.cosine_similarity(without, having, dim=-1)
        assert entry.score == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def states_behind(gone: list[tuple[int, str]], block: int) -> Tensor:
    """Return the states behind a block of a model without some sub-blocks, for all calibration tokens."""
    model, caught = silenced(made(), gone), list[Tensor]()
    layer = model.get_submodule(f"model.layers.{block}")
    layer.register_forward_hook(lambda _, __, output: caught.append(output.double().reshape(-1, 64)))
    for batch in batches():
        with torch.no_grad():
            model(batch, use_cache=False)
    return torch.cat(caught)


@by_variant
def test_a_pruned_model_is_healed(variant: str) -> None:
    model = made(variant)
    prune(model, batches(), load_recipe("fasp", {"units": "mlp", "sparsity": 0.3, "allocation.multiple": 1}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name:
                weight.mul_(0.8)
    scalars = {name: value.clone() for name, value in model.named_buffers() if name.endswith("layer_scalar")}
    report = heal(
        model, made(variant), batches()[:3], held_out=batches()[3], settings=HealingSettings(learning_rate=1e-3)
    )
    assert report.after.divergence < report.before.divergence
    assert all(torch.equal(value, scalars[name]) for name, value in model.named_buffers() if name in scalars)
    assert len(scalars) == len(Decoder(model).blocks)


def test_a_smaller_vocabulary_is_refused_by_name() -> None:
    for rows in (512, 600):
        with pytest.raises(InputError, match=r"^model\.embed_tokens_per_layer\.weight has a row for each token too"):
            TokenRows.of(made(vocab_size_per_layer_input=rows))


def test_the_target_onnx_refuses_it() -> None:
    decoder = Decoder(made().to("meta"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the target onnx does not take models of the kind gemma4_text"):
        RUNTIMES["onnx"].fitted(Recipe(units="mlp"), decoder)


def test_onnx_refuses_it_by_name(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"gemma4_text models? cannot be exported to ONNX"):
        export(tmp_path / "model", tmp_path / "out", OnnxFolder())
    assert not (tmp_path / "out").exists()
