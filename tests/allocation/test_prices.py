"""Prices of blocks: weights and operations by counting, time by a clock; and budgets in each of them."""

import copy
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optprune.allocation import Allocation, currency
from optprune.allocation.currency import Prices, operations, prices_of
from optprune.calibration import calibrating
from optprune.calibration.stream import run_block
from optprune.errors import InputError
from optprune.models import BlockAllocation, BlockShape, Decoder, KvGroups, Mlp, Values
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches

KINDS = (Mlp(), Values())


def pruned(make, units, sparsity=0.2, **settings):
    model = make()
    prune(model, batches(), load_recipe("fasp", {"units": units, "sparsity": sparsity, **settings}))
    return model


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("units", ["mlp", "vo", "kv-groups"])
def test_operations_are_those_that_torch_counts(name: str, units: str) -> None:
    sparsity = {"mlp": 0.2, "vo": 0.05, "kv-groups": 0.1}[units]
    model = pruned(TINY_MODELS[name], units, sparsity)
    model.config._attn_implementation = "eager"
    decoder, tokens = Decoder(model), 24
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    counted = 0
    for module, operators in counter.get_flop_counts().items():
        if module == type(model.base_model).__name__:
            counted = sum(operators.values())
    heads, expected = decoder.heads, 0.0
    for shape in decoder.shapes():
        # Without a causal kernel torch multiplies all positions with all, where (tokens + 1) / 2 are seen on average.
        unseen = 2 * shape.kv_heads * heads.group * (heads.dim + shape.value_dim) * (tokens - 1) / 2
        expected += tokens * (operations(decoder, shape, tokens) + unseen)
    # The rotary embeddings multiply too, once for the model.
    assert counted - expected == pytest.approx(0, abs=2 * tokens * heads.dim)


def test_prices_in_weights_and_operations_are_those_of_the_shape() -> None:
    decoder = Decoder(tiny_llama())
    shape = decoder.shape(0)
    for budget, cost in (
        ("parameters", decoder.weights_of),
        ("flops", lambda shape: operations(decoder, shape, 64)),
    ):
        prices = prices_of(decoder, budget, 64, KINDS)
        assert prices.whole == tuple(cost(shape) for shape in decoder.shapes())
        for kind, count in product((Mlp(), KvGroups(), Values()), (0, 1)):
            assert prices.narrowed(1, kind, count) == cost(kind.with_count(shape, count))
    assert Values().with_count(shape, 0) == BlockShape(shape.mlp_width, 0, 0)


def test_operations_are_of_the_experts_that_a_token_goes_to() -> None:
    decoder = Decoder(ALL_MODELS["qwen2_moe"]())
    heads, shape, tokens = decoder.heads, decoder.shape(0), 24
    attention = 2 * 64 * heads.dim * (heads.query + heads.kv)  # Q and O, K and V
    weights = attention + 3 * 64 * (40 + 2 * 48)  # the shared one, and two of four
    scores = heads.query * (tokens + 1) / 2 * 2 * heads.dim
    assert operations(decoder, shape, tokens) == 2 * (weights + scores)


@pytest.fixture
def a_clock_that_counts_weights(monkeypatch):
    """In place of a clock: a block must still run, and takes a second for each weight that it holds then."""

    def seconds(decoder, block, stream):
        _, output = run_block(decoder.blocks[block], stream.hidden[0], stream.arguments[0])
        assert output.shape == stream.hidden[0].shape
        return float(sum(decoder.layer(block, path).weight.numel() for path in decoder.paths(block)))

    monkeypatch.setattr("optprune.allocation.currency._seconds", seconds)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_timed_are_blocks_of_that_shape(name: str, a_clock_that_counts_weights) -> None:
    model = TINY_MODELS[name]()
    decoder, untouched = Decoder(model), copy.deepcopy(model)
    kinds = (Mlp(), Values(), KvGroups())
    with calibrating(decoder):
        prices = prices_of(decoder, "time", 32, kinds)
    shape = decoder.shape(1)
    assert prices.whole == tuple(map(decoder.weights_of, decoder.shapes()))
    for kind in kinds:
        there = getattr(shape, kind.field)
        steps = [round(there * step / 8) for step in range(9)]
        for count in steps if there > 8 else range(there + 1):
            expected = decoder.weights_of(kind.with_count(shape, count))
            assert prices.narrowed(1, kind, count) == pytest.approx(expected, rel=1e-5)
        times = [prices.narrowed(1, kind, count) for count in range(there + 1)]
        assert all(first < second for first, second in pairwise(times))
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)


def test_a_clock_that_goes_wrong_gives_prices_that_rise(monkeypatch) -> None:
    noise = iter([5.0] + [3.0, 6.0, 2.0, 9.0, 1.0, 4.0, 4.0, 4.0] * 4)
    monkeypatch.setattr("optprune.allocation.currency._seconds", lambda *_: next(noise))
    prices = prices_of(Decoder(tiny_llama(num_hidden_layers=1)), "time", 32, [Mlp()])
    times = [prices.narrowed(0, Mlp(), count) for count in range(129)]
    assert all(first < second for first, second in pairwise(times))
    assert times[-1] == 5.0


def wide_llama():
    return tiny_llama(hidden_size=256, intermediate_size=2048, num_hidden_layers=1)


def test_half_of_a_wide_mlp_takes_half_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with the products of linear layers: that of a shared machine says anything."""
    decoder, products = Decoder(wide_llama()), [0.0]

    def count(module: nn.Module, _: object, output: object) -> None:
        if isinstance(module, nn.Linear):
            products[0] += module.weight.numel()

    monkeypatch.setattr("optprune.allocation.currency.clock", lambda _: products[0])
    counting = nn.modules.module.register_module_forward_hook(count)
    try:
        with calibrating(decoder):
            prices = prices_of(decoder, "time", 512, [Mlp()])
    finally:
        counting.remove()
    without, half, whole = (prices.narrowed(0, Mlp(), count) for count in (0, 1024, 2048))
    assert (half - without) / (whole - without) == pytest.approx(0.5, rel=1e-6)


def divided_by(prices: Prices, monkeypatch: pytest.MonkeyPatch, **settings) -> Allocation:
    monkeypatch.setattr("optprune.allocation.width_costs.prices_of", lambda *_: prices)
    report = prune(
        tiny_llama(),
        batches(),
        load_recipe(
            "structured_best", {"units": "mlp", "allocation.multiple": 16, "allocation.probe_tokens": 0, **settings}
        ),
    )
    assert any(prices.unit in note for note in report.notes)
    return Allocation(
        tuple(BlockAllocation(BlockShape(**block)) for block in report.allocation["blocks"]), report.sparsity_reached
    )


def test_a_budget_in_time_takes_from_where_it_saves_time(monkeypatch) -> None:
    """Units of the second block that cost ten times as much go first, and the share of the time is met."""

    def prices(first: float, second: float) -> Prices:
        each = (first, second)
        return Prices("the time", tuple(128 * cost for cost in each), lambda block, _, count: each[block] * count)

    in_time = {"allocation.currency": "time", "sparsity": 0.3, "allocation.least": 0.1}
    alike = divided_by(prices(1, 1), monkeypatch, **in_time)
    uneven = divided_by(prices(1, 10), monkeypatch, **in_time)
    taken = [[128 - block.shape.mlp_width for block in found.blocks] for found in (alike, uneven)]
    assert taken[1][1] / sum(taken[1]) > taken[0][1] / sum(taken[0])
    for found, (first, second) in ((alike, (1, 1)), (uneven, (1, 10))):
        saved = sum(
            cost * (128 - block.shape.mlp_width) for cost, block in zip((first, second), found.blocks, strict=True)
        )
        step = 16 * max(first, second)
        assert 0 <= saved - 0.3 * 128 * (first + second) <= step


@pytest.mark.parametrize("budget", ["flops", "time"])
@pytest.mark.parametrize("units", ["mlp", "all", "kv-groups"])
def test_budgets_are_in_the_report(budget: str, units: str, a_clock_that_counts_weights) -> None:
    sparsity = 0.1 if units == "kv-groups" else 0.2
    settings = {
        "allocation.currency": budget,
        "units": units,
        "sparsity": sparsity,
        "allocation.tokens": 64,
        "allocation.least": 0.1,
    }
    report = prune(tiny_llama(), batches(), load_recipe("structured_best", settings))
    saves = report.allocation["saves"]
    assert float(saves.split("%")[0]) / 100 >= sparsity
    assert ("operations" if budget == "flops" else "time on 64 tokens") in saves
    assert any(saves in note for note in report.notes)
    assert 0 < report.sparsity_reached < 1


def test_whole_sub_blocks_go_where_nothing_need_be_kept() -> None:
    """An MLP that does nothing costs nothing to remove; one unit must stay where the least share says so."""

    def useless_mlp():
        model = tiny_llama()
        torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
        return model

    def shapes(least: float):
        model = useless_mlp()
        recipe = load_recipe("structured_best", {"units": "mlp", "sparsity": 0.3, "allocation.least": least})
        report = prune(model, batches(), recipe)
        logits = model(input_ids=torch.arange(5, 25)[None]).logits
        assert bool(torch.isfinite(logits).all())
        return [BlockShape(**block) for block in report.allocation["blocks"]]

    assert shapes(0)[1].mlp_width == 0
    assert shapes(0.01)[1].mlp_width > 0


def test_attention_goes_whole_with_its_queries_and_keys() -> None:
    def useless_attention():
        model = tiny_llama()
        torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
        return model

    for units in ("vo", "kv-groups", "all"):
        model = useless_attention()
        settings = {"units": units, "sparsity": 0.05, "allocation.least": 0}
        report = prune(model, batches(), load_recipe("structured_best", settings))
        assert Decoder(model).shape(1).kv_heads == 0
        assert report.sparsity_reached >= 0.05


def test_what_is_refused() -> None:
    for settings in ({"allocation": "uniform"}, {"units": "weights", "units.weights": "unstructured", "solver": None}):
        with pytest.raises(InputError, match=r"allocation\.currency"):
            load_recipe("structured_best", {"allocation.currency": "flops", "refit.dampings": [], **settings})
    with pytest.raises(InputError, match=r"allocation\.currency"):
        Recipe({"allocation.currency": "seconds"})
    decoder = Decoder(tiny_llama())
    with pytest.raises(InputError, match="positions"):
        prices_of(decoder, "time", 1 << 20, KINDS)
    with pytest.raises(InputError, match="the blocks' operations can be removed"):
        prune(
            tiny_llama(),
            batches(),
            load_recipe("structured_best", {"units": "mlp", "allocation.currency": "flops", "sparsity": 0.6}),
        )


def test_a_block_of_each_shape_is_timed_at_eight_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/explanation/budgets.md says; the ninth is the block as it is."""
    timed = list[tuple[int, int]]()

    def seconds(decoder: Decoder, block: int, stream: Any) -> float:
        timed.append((block, decoder.shape(block).mlp_width))
        return 1.0

    monkeypatch.setattr(currency, "_seconds", seconds)
    monkeypatch.setattr(currency, "_without", lambda decoder, block, *_: timed.append((block, 0)) or 0.1)
    monkeypatch.setattr(currency, "_narrower", lambda _, block, __, ___, count: timed.append((block, count)) or 0.5)
    prices_of(Decoder(tiny_llama(num_hidden_layers=3)), "time", 16, [Mlp()])
    assert timed == [(0, 128), (0, 0), *((0, 16 * step) for step in range(1, 8))], "128 units, of one shape"
    assert "runs at eight widths" in Path("docs/explanation/budgets.md").read_text()
