"""Allocations: every block its own numbers, given or uniform, obeyed by the pipeline, written to and read from JSON."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optprune.allocation import Allocation
from optprune.allocation.allocation import everything
from optprune.allocation.uniform import uniform
from optprune.calibration import POLICIES
from optprune.errors import InputError
from optprune.models import UNITS, BlockAllocation, BlockShape, Decoder, KvGroups, Mlp, Weights
from optprune.moments import InputMoments
from optprune.objectives import LayerContext, linked
from optprune.problems import Problem
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.layer_inputs import inputs_of
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_opt
from tests.helpers.token_batches import batches


def given(decoder: Decoder, *shapes: BlockShape) -> Allocation:
    return Allocation.of(decoder, map(BlockAllocation, shapes))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_block_keeps_what_the_allocation_gives_it(name: str, policy: str) -> None:
    model = TINY_MODELS[name](num_hidden_layers=5)
    decoder = Decoder(model)
    heads = decoder.heads
    wanted = [
        BlockShape(40, heads.kv, 16),  # MLP units
        BlockShape(128, heads.kv, 9),  # value dimensions
        BlockShape(0, heads.kv - 1, 16),  # the MLP, and a KV head
        BlockShape(77, 0, 0),  # attention, and MLP units
        BlockShape(128, heads.kv, 16),
    ]
    allocation = given(decoder, *wanted)
    before = decoder.linear_weights()
    report = prune(
        model, batches(), load_recipe("fasp", {"units": "mlp", "propagation": policy}), allocation=allocation
    )
    assert list(Decoder(model).shapes()) == wanted
    assert report.sparsity_requested == allocation.sparsity
    assert report.sparsity_reached == pytest.approx(allocation.sparsity, abs=1e-12)
    assert allocation.sparsity == 1 - Decoder(model).linear_weights() / before
    assert Allocation.from_json(json.dumps(report.allocation)) == allocation
    # Block 4 keeps all: there is something to solve only where its inputs have drifted from the dense model's.
    solved = {(int(layer.name.split(".layers.")[1].split(".")[0]), layer.kept, layer.units) for layer in report.layers}
    expected = {(0, 40, 128), (1, 9 * heads.kv, 16 * heads.kv), (2, heads.kv - 1, heads.kv), (3, 77, 128)}
    if POLICIES[policy].dense_target:
        expected |= {(1, 128, 128), (4, 128, 128)}
    assert solved == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_the_statistics_of_a_block_know_what_was_removed_from_it(policy: str) -> None:
    dense = tiny_llama(num_hidden_layers=3)
    model = copy.deepcopy(dense)
    promise = POLICIES[policy]
    seen: dict[str, InputMoments] = {}
    snapshots: list[torch.nn.Module] = []

    def objective(context: LayerContext) -> Problem:
        seen[context.name] = context.loss.moments
        snapshots.append(copy.deepcopy(model))
        return linked(context)

    allocation = given(Decoder(model), BlockShape(64, 2, 16), BlockShape(64, 0, 0), BlockShape(64, 2, 16))
    prune(model, batches(), Recipe(objective=objective, propagation=policy), allocation=allocation)
    for block in (1, 2):
        # The model as it was when this block's statistics were taken.
        at_the_time = copy.deepcopy(dense)
        for before in range(0 if promise.independent else block):
            at_the_time.model.layers[before] = Decoder(snapshots[-1]).blocks[before]
        target = copy.deepcopy(at_the_time) if policy == "local" else dense
        if block == 1:
            Decoder(at_the_time).remove(1, "attention")
        name = f"model.layers.{block}.mlp.down_proj"
        actual, ideal = inputs_of(at_the_time, name), inputs_of(target, name)
        if policy == "partial":
            ideal = (actual + ideal) / 2
        expected = InputMoments.from_samples(actual, ideal)
        scale = expected.gram.abs().max()
        assert (seen[name].gram - expected.gram).abs().max() <= 1e-5 * scale
        differs = block == 1 or policy in ("cross", "partial")
        assert (seen[name].dense is not None) == (promise.dense_target and differs)
        if seen[name].dense is not None:
            assert (seen[name].dense.cross - expected.dense.cross).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "2:4"])
def test_every_layer_keeps_its_own_share_of_single_weights(pattern: str) -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    down, query = "mlp.down_proj", "self_attn.q_proj"
    shares = [{down: 0.5}, {down: 0.5, query: 0.5}] if pattern == "2:4" else [{down: 0.25}, {down: 0.75, query: 0.5}]
    blocks = [BlockAllocation(shape, part) for shape, part in zip(decoder.shapes(), shares, strict=True)]
    allocation = Allocation.of(decoder, blocks)
    recipe = load_recipe("magnitude", {"units.weights": pattern})
    report = prune(model, batches(), recipe, allocation=Allocation.from_json(allocation.to_json()))
    assert report.sparsity_reached == pytest.approx(allocation.sparsity, abs=1e-9)
    for index, block in enumerate(allocation.blocks):
        for path in decoder.paths(index):
            weight = decoder.layer(index, path).weight
            assert int((weight != 0).sum()) == block.share(path) * weight.numel()
    # A layer that keeps all is left alone.
    assert len(report.layers) == 3


@pytest.mark.parametrize("sparsity", [0.06, 0.1, 0.15])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_uniform_kv_groups_meet_the_budget_as_nearly_as_heads_can(name: str, sparsity: float) -> None:
    decoder = Decoder(TINY_MODELS[name](num_attention_heads=8, num_key_value_heads=4) if name != "opt" else tiny_opt())
    heads, total = decoder.heads, decoder.linear_weights()
    step = 2 * 64 * (heads.group + 1) * 2 * heads.dim / total
    if sparsity < step / 2:
        with pytest.raises(InputError, match="rounds to nothing"):
            uniform(decoder, sparsity, KvGroups(), None)
        return
    allocation = uniform(decoder, sparsity, KvGroups(), None)
    [shape] = {block.shape for block in allocation.blocks}
    assert (shape.mlp_width, shape.value_dim) == (128, heads.dim)
    assert allocation.sparsity == pytest.approx(step * (heads.kv - shape.kv_heads))
    assert abs(allocation.sparsity - sparsity) <= step / 2 + 1e-12
    report = prune(decoder.model, batches(), load_recipe("fasp", {"units": "kv-groups", "sparsity": sparsity}))
    assert {(layer.kept, layer.units) for layer in report.layers} == {(shape.kv_heads, heads.kv)}
    assert report.sparsity_reached == pytest.approx(allocation.sparsity, abs=1e-12)


def test_the_kv_groups_kept_are_those_whose_columns_matter() -> None:
    """FASP's score of a group is the sum over its columns, so a group of tiny columns must go."""
    model = tiny_llama(num_key_value_heads=4)
    with torch.no_grad():
        for block, head in zip(model.model.layers, (2, 0), strict=True):
            block.self_attn.o_proj.weight[:, head * 16 : (head + 1) * 16] *= 1e-3
    before = copy.deepcopy(model)
    prune(model, batches(), load_recipe("fasp", {"units": "kv-groups", "sparsity": 0.1}))
    for block, old, head in zip(model.model.layers, before.model.layers, (2, 0), strict=True):
        rows = [row for row in range(64) if row // 16 != head]
        for path in ("q_proj", "k_proj", "v_proj"):
            new = block.self_attn.get_submodule(path).weight
            assert torch.equal(new, old.self_attn.get_submodule(path).weight[rows])


def test_a_uniform_share_of_uneven_blocks_is_a_share_of_each() -> None:
    model = tiny_llama(num_hidden_layers=3)
    decoder = Decoder(model)
    prune(model, batches(), Recipe(), allocation=given(decoder, *(BlockShape(width, 2, 16) for width in (32, 64, 128))))
    again = uniform(Decoder(model), 0.25, Mlp(), 1)
    widths = [block.shape.mlp_width for block in again.blocks]
    assert [width * 4 for width in widths] == pytest.approx([widths[0] * 4, widths[0] * 8, widths[0] * 16], abs=6)
    assert again.sparsity == pytest.approx(0.25, abs=0.01)


def test_an_allocation_survives_json() -> None:
    decoder = Decoder(tiny_opt())
    for allocation in (
        uniform(decoder, 0.3, UNITS["all"], 8),
        uniform(decoder, 0.5, Weights(), 8),
        everything(decoder),
    ):
        assert Allocation.from_json(allocation.to_json()) == allocation
    saving = Allocation.of(decoder, everything(decoder).blocks, "20% of the time")
    assert Allocation.from_json(saving.to_json()) == saving


def test_it_is_told_by_what_differs_from_block_to_block() -> None:
    assert everything(Decoder(tiny_opt())).lines() == []
    shape = Decoder(tiny_opt()).shape(0)
    widths = Allocation((BlockAllocation(replace(shape, mlp_width=40)), BlockAllocation(shape)), 0.1)
    assert widths.lines() == [f"mlp_width by block: 40 {shape.mlp_width}"]
    shares = Allocation((BlockAllocation(shape, {"fc1": 0.5}), BlockAllocation(shape, {"fc1": 0.25})), 0.1)
    assert shares.lines() == ["kept of fc1 by block: 50% 25%"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"blocks": []}',
        '{"sparsity": 0.1, "blocks": [{"mlp_width": 1.5, "kv_heads": 2, "value_dim": 16}]}',
        '{"sparsity": 0.1, "blocks": [{"mlp_width": 8, "heads": 2}]}',
        '{"sparsity": 0.1, "blocks": [{"mlp_width": 8, "kv_heads": 2, "value_dim": 16, "shares": {"a": "b"}}]}',
    ],
)
def test_what_is_not_an_allocation_is_an_error_in_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match="this is not an allocation") as error:
        Allocation.from_json(text)
    assert "\n" not in str(error.value)


WHOLE = BlockShape(128, 2, 16)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([BlockAllocation(WHOLE)], "is for 1 block, but the model has 2"),
        ([BlockAllocation(replace(WHOLE, mlp_width=129))] * 2, "keeps mlp_width 129 in block 0, which has 128"),
        ([BlockAllocation(replace(WHOLE, kv_heads=-1))] * 2, "keeps kv_heads -1 in block 0"),
        ([BlockAllocation(replace(WHOLE, value_dim=0))] * 2, "keeps value_dim 0 in block 0"),
        ([BlockAllocation(BlockShape(128, 0, 0))] * 2, "keeps no attention"),
        ([BlockAllocation(BlockShape(128, 1, 8))] * 2, "removes KV heads and value dimensions of block 0"),
        ([BlockAllocation(WHOLE, {"mlp.fc1": 0.5})] * 2, "names mlp.fc1 in block 0, which has no such linear layer"),
        ([BlockAllocation(WHOLE, {"mlp.up_proj": 0.0})] * 2, "keeps a share 0 of mlp.up_proj"),
        ([BlockAllocation(BlockShape(8, 2, 16), {"mlp.up_proj": 0.5})] * 2, "narrows block 0 and removes single"),
    ],
)
def test_an_allocation_that_does_not_fit_the_model_is_refused(blocks: list[BlockAllocation], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prune(tiny_llama(), batches(), load_recipe("fasp"), allocation=Allocation(tuple(blocks), 0.1))


@pytest.mark.parametrize(
    ("recipe", "options", "block", "reason"),
    [
        ("fasp", {}, BlockAllocation(WHOLE, {"mlp.up_proj": 0.5}), "use a recipe with units weights"),
        ("wanda", {}, BlockAllocation(BlockShape(64, 2, 16)), "units are single weights"),
        ("alps", {"units.weights": "2:4"}, BlockAllocation(WHOLE, {"mlp.up_proj": 0.6}), "share than the pattern 2:4"),
    ],
)
def test_an_allocation_that_does_not_fit_the_recipe_is_refused(
    recipe: str, options: dict[str, str], block: BlockAllocation, reason: str
) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(InputError, match=reason):
        prune(model, batches(), load_recipe(recipe, options), allocation=Allocation((block, block), 0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_whole_blocks_can_go_from_a_sparse_model_too() -> None:
    model = tiny_llama()
    blocks = (BlockAllocation(BlockShape(0, 0, 0)), BlockAllocation(WHOLE, {"mlp.up_proj": 0.5}))
    allocation = Allocation.of(Decoder(model), blocks)
    report = prune(model, batches(), load_recipe("wanda"), allocation=allocation)
    assert model.config.num_hidden_layers == 1
    assert report.sparsity_reached == pytest.approx(allocation.sparsity, abs=1e-9)
    weight: Tensor = model.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == 0.5


def test_what_a_file_says_of_its_sparsity_is_not_believed() -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    shape = decoder.shape(0)
    narrow = given(decoder, replace(shape, mlp_width=64), shape)
    report = prune(model, batches(), load_recipe("fasp"), allocation=replace(narrow, sparsity=math.nan))
    assert report.sparsity_requested == narrow.sparsity
