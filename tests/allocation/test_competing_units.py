"""KV heads beside value dimensions in one budget: a block loses of one of them, and no budget is the worse for it."""

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import optprune
from optprune import Allocation
from optprune.allocation.width_costs import WidthBudget, WidthCosts, WidthCurve
from optprune.calibration import DenseStatistics
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import UNITS, BlockAllocation, BlockShape, Decoder, Units
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.faults import noticed
from tests.helpers.programs import program_of
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches

HEADS = UNITS["all-heads"]
COUNTS = {"mlp": range(0, 128, 32), "vo": range(0, 16, 8), "kv-groups": range(4)}
"""what a block of four KV heads may keep of each kind of units, but all"""
FOUR_HEADS = Decoder(tiny_llama(num_key_value_heads=4))


# -- the division, on curves that are given


@st.composite
def some_curves(draw: st.DrawFn) -> list[WidthCurve]:
    """Curves of two blocks: of each kind of units losses that rise with what goes; gone is gone, whatever the kind."""
    found = []
    for block in range(2):
        gone = draw(st.integers(1, 60))
        for kind in HEADS.kinds:
            counts = [count for count in COUNTS[kind.name] if count]
            rising = sorted(draw(st.lists(st.integers(0, 40), min_size=len(counts), max_size=len(counts))))
            losses = {count: float(lost) for count, lost in zip(reversed(counts), rising, strict=True)}
            found.append(WidthCurve(block, kind, kind.there(FOUR_HEADS.shape(block)), {**losses, 0: float(gone)}))
    return found


def division(curves: list[WidthCurve], units: Units, sparsity: float, least: float) -> tuple[BlockShape, ...]:
    """What the allocator keeps, by the curves of these units."""
    budget = WidthBudget(units, sparsity, least, None, "parameters", 512)
    costs = WidthCosts(budget, FOUR_HEADS, DenseStatistics(), None, False)
    costs.widths = [curve for curve in curves if curve.kind in units.kinds]
    return tuple(block.shape for block in costs.allocation(lambda event: None).blocks)


def lost(curves: list[WidthCurve], block: int, shape: BlockShape) -> float:
    """The loss of a block of this shape, read off what is narrower: by no part of what chose it."""
    (values, heads, mlp) = (curve for curve in curves if curve.block == block)
    total = mlp.losses[shape.mlp_width] if shape.mlp_width < 128 else 0.0
    if (shape.kv_heads, shape.value_dim) == (0, 0):
        assert values.losses[0] == heads.losses[0]
        return total + heads.losses[0]
    assert shape.kv_heads == 4 or shape.value_dim == 16
    total += heads.losses[shape.kv_heads] if shape.kv_heads < 4 else 0.0
    return total + (values.losses[shape.value_dim] if shape.value_dim < 16 else 0.0)


def every_shape(least: float) -> list[BlockShape]:
    """All that one block may be."""
    able = {
        name: [count for count in (*counts, there) if count >= least * there]
        for (name, counts), there in zip(COUNTS.items(), (128, 16, 4), strict=True)
    }
    attention = {(4, dims) for dims in able["vo"] if dims} | {(heads, 16) for heads in able["kv-groups"] if heads}
    attention |= {(0, 0)} if not least else set()
    return [BlockShape(width, *heads) for width, heads in product(able["mlp"], sorted(attention))]


def saved(shape: BlockShape) -> int:
    return FOUR_HEADS.weights_of(FOUR_HEADS.shape(0)) - FOUR_HEADS.weights_of(shape)


@settings(max_examples=25, deadline=None)
@given(some_curves(), st.sampled_from([0.1, 0.2, 0.3]), st.sampled_from([0.0, 0.4]))
def test_a_budget_with_heads_is_met_and_never_loses_more_than_without(
    curves: list[WidthCurve], sparsity: float, least: float
) -> None:
    due = sparsity * FOUR_HEADS.linear_weights()
    totals = []
    for units in ("all-heads", "all"):
        shapes = division(curves, UNITS[units], sparsity, least)
        assert sum(map(saved, shapes)) >= due
        assert any(shape.kv_heads for shape in shapes)
        totals.append(sum(lost(curves, block, shape) for block, shape in enumerate(shapes)))
    with_heads, without = totals
    assert with_heads <= without + 1e-9
    # Of all that two blocks may be nothing is better, were every pair tried.
    able = every_shape(least)
    first, second = ([(saved(shape), lost(curves, block, shape), shape.kv_heads) for shape in able] for block in (0, 1))
    pairs = [one[1] + two[1] for one in first for two in second if one[0] + two[0] >= due and one[2] + two[2]]
    assert with_heads >= min(pairs) - 1e-9


LUMPS = [
    {"vo": {8: 30.0}, "kv-groups": {3: 3.0, 2: 33.0}, "mlp": {96: 11.0, 64: 12.0}},
    {"vo": {8: 37.0}, "kv-groups": {3: 18.0, 2: 20.0}, "mlp": {96: 2.0, 64: 18.0}},
]
"""losses of which the greedy, which stops before a step that would be too much, makes more with heads than without"""


def test_a_choice_more_loses_no_more_where_the_greedy_would() -> None:
    curves = [
        WidthCurve(block, kind, kind.there(FOUR_HEADS.shape(block)), {**losses[kind.name], 0: 99.0})
        for block, losses in enumerate(LUMPS)
        for kind in HEADS.kinds
    ]
    for units in ("all", "all-heads"):
        shapes = division(curves, UNITS[units], 0.3, 0.4)
        assert sum(lost(curves, block, shape) for block, shape in enumerate(shapes)) == 30.0


def test_heads_are_taken_where_they_cost_less_and_value_dimensions_where_those_do() -> None:
    """One block's heads are free and the other's value dimensions are; all else is dear."""
    cheap = {("kv-groups", 0), ("vo", 1)}
    curves = [
        WidthCurve(
            block,
            kind,
            kind.there(FOUR_HEADS.shape(block)),
            {count: (0.1 if (kind.name, block) in cheap and count else 50.0) for count in COUNTS[kind.name]},
        )
        for block in range(2)
        for kind in HEADS.kinds
    ]
    first, second = division(curves, HEADS, 0.13, 0.4)
    assert (first.kv_heads, first.value_dim) == (2, 16)
    assert (second.kv_heads, second.value_dim) == (4, 8)


@pytest.mark.parametrize("better", ["vo", "kv-groups"])
def test_of_two_choices_that_save_the_same_it_is_the_better_one(better: str) -> None:
    """Half of the value dimensions of four heads, or one head with its queries and keys."""
    losses = {"vo": {8: 5.0, 0: 9.0}, "kv-groups": {3: 5.0, 0: 9.0}, "mlp": {0: 99.0}}
    losses[better] = {count: 3.0 if count else 9.0 for count in losses[better]}
    curves = [
        WidthCurve(block, kind, kind.there(FOUR_HEADS.shape(block)), losses[kind.name])
        for block, kind in product(range(2), HEADS.kinds)
    ]
    whole = FOUR_HEADS.shape(0)
    alone = replace(whole, value_dim=8) if better == "vo" else replace(whole, kv_heads=3)
    assert division(curves, HEADS, 0.1, 0.4) == (alone, alone)


def test_the_last_head_stays_unless_the_sub_block_may_go() -> None:
    """Heads that cost nothing: with a least share some stay, without one the attention of a block may go."""
    curves = [
        WidthCurve(block, kind, kind.there(FOUR_HEADS.shape(block)), dict.fromkeys(COUNTS[kind.name], cost))
        for block in range(2)
        for kind in HEADS.kinds
        for cost in (0.0 if kind.name == "kv-groups" else 9.0,)
    ]
    for least, expected in ((0.4, {2}), (0.2, {1}), (0.0, {0, 1})):
        found = division(curves, HEADS, 0.1, least)
        assert {shape.kv_heads for shape in found} == expected


# -- whole runs


def a_head_that_nobody_needs(model: PreTrainedModel, block: int, head: int) -> PreTrainedModel:
    """The output projection reads nothing of a KV head's query heads."""
    decoder = Decoder(model)
    width = decoder.heads.group * decoder.heads.dim
    decoder.layer(block, decoder.architecture.output).weight.data[:, head * width : (head + 1) * width] = 0
    return model


def recipe_with(**more: object) -> optprune.Recipe:
    return load_recipe(
        "structured_best", {"units": "all-heads", "sparsity": 0.1, "allocation.probe_tokens": 64, **more}
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_head_that_nobody_needs_goes_with_its_queries_and_keys(name: str, tmp_path: Path) -> None:
    model = a_head_that_nobody_needs(TINY_MODELS[name](), 1, 1)
    decoder, dense = Decoder(model), Decoder(copy.deepcopy(model))
    heads, output = decoder.heads, decoder.architecture.output
    report = prune(model, batches(), recipe_with())
    shapes = decoder.shapes()
    assert (shapes[1].kv_heads, shapes[1].value_dim) == (heads.kv - 1, heads.dim)
    assert report.sparsity_reached == report.allocation["sparsity"]
    assert report.sparsity_reached == pytest.approx(1 - decoder.linear_weights() / dense.linear_weights(), abs=1e-12)
    for path in {decoder.architecture.query, decoder.architecture.key, decoder.architecture.value}:
        old, new = (each.layer(1, path).weight for each in (dense, decoder))
        assert torch.equal(new, old[torch.arange(len(old)) * heads.kv // len(old) != 1])
    assert decoder.layer(1, output).in_features == dense.layer(1, output).in_features * (heads.kv - 1) // heads.kv
    # A folder holds as many, and is read again.
    ids = torch.arange(10, 42)[None]
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert Decoder(again).shapes() == shapes
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_sliced_off_might_as_well_be_zero(name: str) -> None:
    """A block without a head and one with fewer value dimensions, against a model that kept all with zeros there."""
    model = TINY_MODELS[name]()
    decoder, dense = Decoder(model), Decoder(copy.deepcopy(model))
    heads, names = decoder.heads, decoder.architecture
    wanted = [replace(decoder.shape(0), kv_heads=heads.kv - 1), replace(decoder.shape(1), value_dim=9)]
    recipe = recipe_with(propagation="pruned")  # elsewhere layers that keep everything are refitted too
    prune(model, batches(), recipe, allocation=Allocation.of(decoder, map(BlockAllocation, wanted)))
    assert list(decoder.shapes()) == wanted
    for block in range(2):
        old, new = (each.layer(block, names.value).weight for each in (dense, decoder))
        kept = (old[:, None] == new[None]).all(2).any(1)
        assert int(kept.sum()) == wanted[block].kv_heads * wanted[block].value_dim
        read = kept.view(heads.kv, 1, heads.dim).expand(-1, heads.group, -1).reshape(-1)
        whole, sliced = (each.layer(block, names.output) for each in (dense, decoder))
        with torch.no_grad():
            whole.weight.zero_()[:, read] = sliced.weight
            if whole.bias is not None:
                whole.bias.copy_(sliced.bias)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        # The same products in another order, in float32.
        assert torch.allclose(model(ids).logits, dense.model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("least", [0.0, 0.45])
def test_what_a_plan_counts_is_what_a_probe_tries(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of each kind in each block, and each sub-block gone where it may be."""
    tried = list[int]()
    measured = WidthCosts.divergences

    def listen(probe, on_event, begins):
        found = measured(probe, on_event, begins)
        tried.append(len(found))
        return found

    monkeypatch.setattr(WidthCosts, "divergences", staticmethod(listen))
    recipe, model = recipe_with(**{"allocation.least": least}), tiny_llama()
    program = program_of(recipe, decoder=Decoder(model), length=48)
    prune(model, batches(), recipe)
    assert tried == [2 * program.probe_changes] == [2 * (3 if least else 5)]
    assert len({*program.example.targets}) == 2  # of attention one layer, once


def test_what_is_refused() -> None:
    for units in ("all-heads", "rotated-all-heads"):
        with pytest.raises(InputError, match=f"units '{units}' choose between heads and value dimensions by"):
            prune(tiny_llama(), batches(), load_recipe("fasp", {"units": units}))
    with pytest.raises(InputError, match="units kv-groups remove kv_heads, but olmo2 models"):
        prune(ALL_MODELS["olmo2"](), batches(), recipe_with())
    with pytest.raises(InputError, match="the target transformers does not take blocks of different shapes"):
        RUNTIMES["transformers"].fitted(recipe_with(), Decoder(tiny_llama()))
    # At most the heads of a block and no value dimensions beside, or the other way round.
    most = 1 - 2 * FOUR_HEADS.weights_of(BlockShape(64, 2, 16)) / FOUR_HEADS.linear_weights()
    with pytest.raises(InputError, match=f"allocation.least 0.45: at most {most:.1%} of"):
        program_of(recipe_with(sparsity=most + 0.01), decoder=FOUR_HEADS)


# -- faults planted


def without_competition(self, kinds, prices):
    """In the place of `WidthCosts._choices`: the kinds that come later in a sub-block are forgotten."""
    first = {kind.part: kind for kind in reversed(kinds)}
    return choices(self, list(first.values()), prices)


choices = WidthCosts._choices
FAULTS = {
    "heads forgotten": (WidthCosts, "_choices", without_competition),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed(
        monkeypatch,
        *FAULTS[fault],
        test_heads_are_taken_where_they_cost_less_and_value_dimensions_where_those_do,
    )
