"""Whole experts: what a run removes, against mixtures without them made by hand, and where the folder loads."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import optprune
from optprune import Allocation
from optprune.errors import InputError, StrictError
from optprune.export import save_model
from optprune.models import ARCHITECTURES, Decoder
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.report import Event, LayerSolved
from tests.helpers.cut_mixtures import answers, cut
from tests.helpers.mixed_models import generated
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama, tiny_mixture
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.mixture is not None]
TOKENS = torch.arange(10, 58)[None]
of_mixtures = pytest.mark.parametrize("name", MIXTURES)


@of_mixtures
def test_the_choice_costs_least_of_all_by_removal_by_hand(name: str) -> None:
    """Of the first mixture, whose inputs nothing changes: every two experts, cut out of the stock model's tensors."""
    model, dense = tiny_mixture(name), tiny_mixture(name)
    shapes, first = [shape.counts() for shape in Decoder(model).shapes()], block_with(Decoder(model), 0, "mlp")
    shapes[first]["experts"] = 2
    allocation = Allocation.from_dict({"sparsity": 0.1, "blocks": shapes})
    report = prune(model, batches(), load_recipe("experts_best", {"refit.held_out": 0}), allocation=allocation)
    expected = answers(dense, first)
    costs = {
        kept: float((answers(cut(dense, first, list(kept)), first) - expected).square().sum(1).mean()) / 2
        for kept in combinations(range(4), 2)
    }
    [layer] = report.layers
    assert layer.objective == pytest.approx(min(costs.values()), rel=1e-4)
    assert layer.objective == layer.lower_bound and layer.gap == 0
    share = 2 * min(costs.values()) / float(expected.square().sum(1).mean())
    assert layer.relative_error == pytest.approx(share, rel=1e-4)
    best = cut(dense, first, list(min(costs, key=lambda kept: costs[kept])))
    with torch.no_grad():
        apart = (model(TOKENS).logits - best(TOKENS).logits).abs().max()
        assert apart <= 1e-5 * best(TOKENS).logits.abs().max()
    assert (layer.kept, layer.units) == (2, 4)


def test_the_held_out_error_is_that_of_the_tokens_apart_and_every_choice_is_told() -> None:
    """Of the first block, on the last two of eight sequences, by what the pruned mixture and the dense one answer."""
    model, dense, events = ALL_MODELS["qwen3_moe"](), ALL_MODELS["qwen3_moe"](), list[Event]()
    recipe = load_recipe(
        "experts_best", {"refit.held_out": 0.25, "sparsity": 0.17, "propagation": "dense", "refit.recovery": "none"}
    )
    report = prune(model, batches(), recipe, on_event=events.append)
    Decoder(model).joined()
    apart = batches()[-1].numel()
    found, expected = (answers(each, 0)[-apart:] for each in (model, dense))
    error = float((found - expected).square().sum() / expected.square().sum())
    assert report.layers[0].held_out_error == pytest.approx(error, rel=1e-4)
    assert report.layers[0].relative_error != pytest.approx(error, rel=1e-2)
    assert [event.layer for event in events if isinstance(event, LayerSolved)] == list(report.layers)


@of_mixtures
def test_a_model_with_fewer_experts_is_stock_generates_and_trains(name: str, tmp_path: Path) -> None:
    model = tiny_mixture(name, num_hidden_layers=3)
    before = Decoder(model).linear_weights()
    report = prune(model, batches(), load_recipe("experts_best", {"sparsity": 0.17}))
    left = Decoder(model)
    mixture = left.architecture.mixture
    assert mixture is not None and getattr(model.config, mixture.count) == 3
    assert {shape.experts for shape in left.shapes() if shape.mlp_width} == {3}
    assert report.sparsity_reached == pytest.approx(1 - left.linear_weights() / before)
    assert all(layer.held_out_error is not None for layer in report.layers)
    left.joined()
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is ARCHITECTURES[name].stock.model
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert generated(again) == generated(model, use_cache=False)
    again.train()(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)


def test_blocks_may_keep_unequal_numbers(tmp_path: Path) -> None:
    """By an allocation: the folder has our file then, and loads in a process without optprune."""
    model = ALL_MODELS["qwen3_moe"]()
    shapes = [
        {**shape.counts(), "experts": count} for shape, count in zip(Decoder(model).shapes(), (3, 2), strict=True)
    ]
    allocation = Allocation.from_dict({"sparsity": 0.3, "blocks": shapes})
    prune(model, batches(), load_recipe("reap"), allocation=allocation)
    saved = save_model(model, tmp_path / "out", check_tokens=TOKENS)
    assert not saved.stock and (tmp_path / "out" / "pruned_mixture.py").is_file()
    assert [shape.experts for shape in Decoder(optprune.load_model(tmp_path / "out", device="cpu").model).shapes()] == [
        3,
        2,
    ]


@pytest.mark.parametrize("policy", ["pruned", "cross", "intra", pytest.param("dense", marks=pytest.mark.slow)])
def test_streamed_resumed_and_shared_runs_give_the_same_weights(policy: str, tmp_path: Path) -> None:
    recipe = load_recipe("experts_best", {"propagation": policy, "sparsity": 0.2})
    check_every_way_gives_the_same("mixtral", recipe, tmp_path, shared=policy == "dense")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too much": ({"sparsity": 0.8}, "out of reach with units 'experts': with 2 experts a block, as many as the router"),
    "too little": ({"sparsity": 0.01}, "rounds to nothing: one expert of 4 in each block is 18.8%"),
    "another solver": (
        {"solver": "wanda"},
        "Wanda does not solve the problems of units experts: use expert_elimination",
    ),
    "an objective": ({"objective": "linked"}, "units experts have a fixed objective: leave the objective out"),
    "units of another kind": ({"units": "mlp"}, "Reap does not solve the problems of units mlp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    settings, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        prune(ALL_MODELS["mixtral"](), batches(), load_recipe("reap", settings))


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InputError, match="units experts need a router, and a llama model has none"):
        prune(tiny_llama(), batches(), load_recipe("experts_best"))


def test_fewer_than_the_router_chooses_are_refused() -> None:
    model = ALL_MODELS["mixtral"]()
    shapes = [{**shape.counts(), "experts": 1} for shape in Decoder(model).shapes()]
    allocation = Allocation.from_dict({"sparsity": 0.3, "blocks": shapes})
    with pytest.raises(InputError, match="keeps 1 expert in block 0, where the router chooses 2 for each token"):
        prune(model, batches(), load_recipe("reap"), allocation=allocation)


def test_few_tokens_are_a_note_and_in_strict_mode_an_error() -> None:
    few = [batches()[0][:, :8]]
    report = prune(ALL_MODELS["mixtral"](), few, load_recipe("reap"))
    assert any("some experts get fewer than 32 calibration tokens" in note for note in report.notes)
    with pytest.raises(StrictError, match="some experts get fewer than 32 calibration tokens"):
        prune(ALL_MODELS["mixtral"](), few, load_recipe("reap", {"strict": True}))


def test_single_weights_of_an_expert_without_tokens_are_pruned_with_a_note() -> None:
    """Of four logits a, -a, a / 2 and 0 the last two are never the largest."""
    model: Any = ALL_MODELS["mixtral"](num_experts_per_tok=1)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate[1:] = gate[0] * torch.tensor([-1.0, 0.5, 0.0])[:, None]
    report = prune(model, batches(), Recipe(units="weights", solver="wanda", sparsity=0.5))
    [layer] = [layer for layer in report.layers if layer.name == "model.layers.0.mlp.experts.3.gate_proj"]
    assert layer.tokens == 0 and layer.kept == layer.units // 2
    assert "fewer calibration tokens (0) than inputs (64)" in layer.notes
