"""MLP units of experts: each loses its own, by its own tokens, and equally many, so that folders stay stock."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import optprune
from optprune import Allocation
from optprune.errors import InputError, StrictError
from optprune.export import save_model
from optprune.models import ARCHITECTURES, BlockAllocation, Decoder
from optprune.objectives import LayerContext
from optprune.problems import StructuredLeastSquares
from optprune.pruning import layer_loss, prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.expert_tokens import (
    block_of,
    experts_of,
    first,
    halves,
    in_gpt_oss,
    inner,
    last,
    reaching_experts,
    routed,
)
from tests.helpers.mixed_models import generated
from tests.helpers.tiny_models import ALL_MODELS, tiny_mixture
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.mixture is not None]
TOKENS = torch.arange(10, 58)[None]
of_mixtures = pytest.mark.parametrize("name", MIXTURES)


def kept_by_wanda(weight: Tensor, inputs: Tensor, count: int) -> set[int]:
    """The columns with the largest sum of |w| times the root mean square of their input."""
    return set((weight.double().abs().sum(0) * inputs.square().mean(0).sqrt()).topk(count).indices.tolist())


@of_mixtures
def test_each_expert_loses_the_units_that_its_own_tokens_spare(name: str) -> None:
    """Of the first block, whose inputs nothing changes. By all tokens, or those of another expert, others would go."""
    model, dense = tiny_mixture(name), tiny_mixture(name)
    prune(model, batches(), Recipe(units="mlp", solver="fasp_metric", sparsity=0.25))
    by_others = []
    for expert, (own, others) in enumerate(routed(dense)):
        before, after = last(dense, expert), last(model, expert)
        width = after.shape[1]
        kept = {column for column in range(48) if (before[:, column, None] == after).all(0).any()}
        assert len(kept) == width == last(model, 0).shape[1] < 48
        assert kept == kept_by_wanda(before, inner(dense, expert, own), width)
        by_others.append(kept_by_wanda(before, inner(dense, expert, others), width) != kept)
        # The rows before them go too, of both halves where there are two.
        assert torch.equal(
            first(model, expert),
            torch.cat([half[sorted(kept)] for half in first(dense, expert).chunk(halves(dense))]),
        )
    assert any(by_others)


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "fasp") for name in MIXTURES), ("olmoe", "structured_uniform_best")]
)
def test_the_errors_told_are_those_of_the_tokens_that_reach_each_expert(name: str, recipe: str) -> None:
    model, dense, mixture = tiny_mixture(name), tiny_mixture(name), ARCHITECTURES[name].mixture
    report = prune(model, batches(), load_recipe(recipe, {"units": "mlp", "sparsity": 0.25, "refit": "none"}))
    layers = {layer.name: layer for layer in report.layers}
    for expert, (own, _) in enumerate(routed(dense)):
        layer = layers[f"model.layers.{block_of(dense)}.{mixture.experts}.{expert}.down_proj"]  # type: ignore[union-attr]
        inputs, weight, left = inner(dense, expert, own), last(dense, expert).double(), last(model, expert).double()
        now, before = inner(model, expert, own) @ left.T, inputs @ weight.T
        if in_gpt_oss(model):  # the bias takes the mean of what it adds up
            now, before = now - now.mean(0), before - before.mean(0)
        error = (now - before).square().sum() / before.square().sum()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-4)
        assert (layer.tokens, layer.kept, layer.units) == (len(own), left.shape[1], 48)


@of_mixtures
def test_the_folder_is_stock_generates_and_trains(name: str, tmp_path: Path) -> None:
    model, mixture = tiny_mixture(name), ARCHITECTURES[name].mixture
    before = Decoder(model).linear_weights()
    report = prune(model, batches(), load_recipe("fasp", {"units": "mlp", "sparsity": 0.2}))
    left = Decoder(model)
    [width] = {shape.mlp_width for shape in left.shapes() if shape.experts}
    assert report.sparsity_reached == pytest.approx(1 - left.linear_weights() / before)
    assert report.sparsity_reached == pytest.approx(
        0.2, abs=0.5 * 2 * 4 * 3 * 64 * 8 / before
    )  # half a step of 8 units
    left.joined()
    # The stock class of a family makes the shared expert narrower with the others.
    stock = not mixture.shared_count  # type: ignore[union-attr]
    assert save_model(model, tmp_path / "out").stock is stock
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(again) is ARCHITECTURES[name].stock.model) is stock  # type: ignore[union-attr]
    assert first(again, 3, block=1).shape[0] == halves(again) * width and last(again, 3, block=1).shape == (64, width)
    if name == "qwen2_moe":  # every token goes through one more
        assert again.model.layers[1].mlp.shared_expert.down_proj.weight.shape == (64, 40)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert generated(again) == generated(model, use_cache=False)
    again.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("policy", ["pruned", "cross", pytest.param("dense", marks=pytest.mark.slow)])
def test_streamed_resumed_and_shared_runs_give_the_same_weights(policy: str, tmp_path: Path) -> None:
    recipe = load_recipe("fasp", {"units": "mlp", "propagation": policy, "sparsity": 0.2})
    check_every_way_gives_the_same("mixtral", recipe, tmp_path, shared=policy == "dense")


def test_blocks_may_differ_in_width_and_in_experts(tmp_path: Path) -> None:
    """By an allocation: experts go first, and what is left of them is narrowed; the folder has our file."""
    model = ALL_MODELS["qwen3_moe"]()
    first, second = Decoder(model).shapes()
    shapes = replace(first, experts=3, mlp_width=40), replace(second, mlp_width=24, value_dim=16)
    allocation = Allocation.of(Decoder(model), map(BlockAllocation, shapes))
    report = prune(model, batches(), load_recipe("fasp"), allocation=allocation)
    assert report.sparsity_reached == pytest.approx(allocation.sparsity)
    assert not save_model(model, tmp_path / "out").stock and (tmp_path / "out" / "pruned_mixture.py").is_file()
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert Decoder(again).shapes() == shapes
    Decoder(again).joined()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def with_an_idle_expert() -> Any:
    """One block: of four logits a, -a, a / 2 and 0 the last two are never the largest."""
    model: Any = ALL_MODELS["mixtral"](num_experts_per_tok=1, num_hidden_layers=1)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate[1:] = gate[0] * torch.tensor([-1.0, 0.5, 0.0])[:, None]
    return model


@pytest.mark.parametrize("recipe", ["spap_plus", "structured_uniform_best"])
def test_an_expert_without_tokens_keeps_its_largest_columns_with_a_note(recipe: str) -> None:
    model, settings = with_an_idle_expert(), {"units": "mlp", "sparsity": 0.2}
    report = prune(model, batches(), load_recipe(recipe, settings))
    [layer] = [layer for layer in report.layers if layer.name == "model.layers.0.mlp.experts.3.down_proj"]
    assert layer.tokens == 0 and "fewer calibration tokens (0) than inputs (48)" in layer.notes
    before = last(with_an_idle_expert(), 3)
    largest = before.square().sum(0).topk(layer.kept).indices.sort().values
    assert torch.equal(last(model, 3), before[:, largest])
    told = [note for note in report.notes if "no token of the output metric reached 6 layers" in note]
    assert len(told) == (recipe == "structured_uniform_best")


def test_too_few_tokens_are_a_note_of_the_layers_they_reach() -> None:
    few = [batches()[0][:, :24]]
    report = prune(ALL_MODELS["mixtral"](), few, load_recipe("fasp", {"units": "mlp"}))
    for layer in report.layers:
        assert (f"fewer calibration tokens ({layer.tokens}) than inputs (48)" in layer.notes) == (layer.tokens < 48)
    assert any(layer.tokens < 48 for layer in report.layers)
    with pytest.raises(StrictError, match=r"experts\.\d\.down_proj: fewer calibration tokens"):
        prune(ALL_MODELS["mixtral"](), few, load_recipe("fasp", {"units": "mlp", "strict": True}))


def test_the_loss_of_an_expert_in_a_pruned_model_is_asked_by_name() -> None:
    model, dense = ALL_MODELS["mixtral"](), ALL_MODELS["mixtral"]()
    prune(model, batches(), load_recipe("fasp", {"units": "vo", "sparsity": 0.05}))
    loss = layer_loss(model, batches(), "model.layers.0.mlp.experts.1.down_proj", "cross", dense=dense)
    assert loss.weight.shape == (64, 48) and loss.moments.drift is not None


@pytest.mark.parametrize(("policy", "share"), [("cross", 1.0), ("partial", 0.5)])
def test_tokens_go_to_an_expert_by_the_pruned_routes_in_both_models(policy: str, share: float) -> None:
    """Block 0 has changed and block 1 is the same in both, but its dense router sends other tokens to its experts."""
    model, dense = ALL_MODELS["mixtral"](), ALL_MODELS["mixtral"]()
    with torch.no_grad():
        altered: Any = model
        altered.model.layers[0].self_attn.o_proj.weight[:, ::3] = 0
        altered.model.layers[0].input_layernorm.weight.mul_(3)
    (actual, routes), (ideal, others) = (reaching_experts(each, block=1) for each in (model, dense))
    assert not torch.equal(routes, others)
    for expert in range(len(experts_of(model, 1).down_proj)):
        sent = (routes == expert).any(1)
        pruned, whole = inner(model, expert, actual[sent], block=1), inner(dense, expert, ideal[sent], block=1)
        drift = share * (pruned - whole)
        name = f"model.layers.1.mlp.experts.{expert}.down_proj"
        moments = layer_loss(copy.deepcopy(model), batches(), name, policy, dense=copy.deepcopy(dense)).moments
        assert moments.tokens == len(pruned) and moments.drift is not None
        assert_near(moments.covariance, covariance(pruned, pruned))
        assert_near(moments.drift.cross, covariance(drift, pruned))
        assert_near(moments.drift.covariance, covariance(drift, drift))
        assert_near(moments.drift.mean, drift.mean(0))


def covariance(one: Tensor, other: Tensor) -> Tensor:
    """Cov(one, other) over the tokens."""
    return (one - one.mean(0)).T @ (other - other.mean(0)) / len(one)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The models compute in float32: allow its rounding, relative to the largest entry."""
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def one_fewer(context: LayerContext) -> StructuredLeastSquares:
    """An objective of one's own that keeps a unit less than the budget says of the second expert."""
    assert context.channels is not None
    return StructuredLeastSquares(context.loss, context.channels, context.keep - ("experts.1." in context.name))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "too much": (
        "qwen2_moe",
        {"sparsity": 0.95},
        r"weights \(the expert that every token goes through stays as it is\)",
    ),
    "too little": (
        "mixtral",
        {"sparsity": 0.01},
        "rounds to nothing with a width multiple of 8: a block has mlp_width 48",
    ),
    "odd widths": (
        "mixtral",
        {"allocation.multiple": 3},
        "in block 0, which has 48, but the width of an expert must be a multiple of 8",
    ),
    "odd widths of a budget": (
        "qwen3_moe",
        {"allocation": "global", "allocation.multiple": 4},
        "mlp_width is to be a multiple of 4, but the width of an expert",
    ),
    "heads under one norm": (
        "olmoe",
        {"units": "kv-groups", "sparsity": 0.1},
        "units kv-groups remove kv_heads, but .* models must keep all or none of them: one norm",
    ),
    "experts that differ": (
        "mixtral",
        {"objective": one_fewer},
        r"experts\.1\.down_proj: the objective keeps 31 units",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    name, settings, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        prune(ALL_MODELS[name](), batches(), load_recipe("fasp", {"units": "mlp", **settings}))
