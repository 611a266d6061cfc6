"""Recovery of a sub-module: against dense least squares in float64, and what it promises in a pipeline."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optprune.allocation import Allocation
from optprune.calibration import POLICIES, calibrating, first_inputs, hold_out
from optprune.calibration.calls import Calls, calls_of
from optprune.errors import InputError, StrictError
from optprune.metric import OutputMetric
from optprune.models import BlockAllocation, Decoder
from optprune.models.places import States
from optprune.pruning import prune, refinement
from optprune.pruning.refinement import InnerLayer, ModuleLoss, OutputLayer, recover
from optprune.recipe import load_recipe
from tests.helpers.damaged_modules import PARTS, answers, damaged, linearised
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.token_batches import batches


@torch.no_grad()
def least_squares(module: nn.Module, path: str, calls: Calls, root: Tensor | None = None) -> float:
    """The least error over the nonzero weights of one layer: its Jacobian and numpy's SVD."""
    _, jacobian, change = linearised(module, path, calls)
    if root is not None:
        width = len(root)
        jacobian = (root @ jacobian.reshape(-1, width, jacobian.shape[1])).reshape(jacobian.shape)
        change = (change.reshape(-1, width) @ root.T).reshape(-1)
    solved = np.linalg.lstsq(jacobian.numpy(), change.numpy(), rcond=1e-12)[0]
    rest = change - jacobian @ torch.from_numpy(solved)
    return float(rest.square().sum()) / calls.tokens


def error_of(module: nn.Module, calls: Calls, root: Tensor | None = None) -> float:
    with torch.no_grad():
        change = answers(module, calls) - torch.cat([target.reshape(-1) for target in calls.targets])
    rows = change.reshape(-1, calls.targets[0].shape[-1])
    return float((rows if root is None else rows @ root.T).square().sum()) / calls.tokens


def check_one_layer(name: str, path: str, layers: tuple[str, ...], turn: int) -> None:
    """Many steps of one layer's turn end at the least squares error, on the batches fitted."""
    module, calls = damaged(name, path, layers, torch.float64)
    least, before = least_squares(module, layers[turn], calls), error_of(module, calls)
    with torch.no_grad():
        # The tokens that decide are those fitted, so nothing stops early.
        taken = refinement._Turn(ModuleLoss(module, calls, calls, None), 600, 0.0).take(layers[turn:], before)
    assert taken is not None and taken.steps > 0
    # What the turn learns on its way is what passes before and after it say.
    assert taken.before == pytest.approx(before, rel=1e-9)
    assert taken.after == pytest.approx(error_of(module, calls), abs=1e-9 * before)
    assert -1e-9 * before <= error_of(module, calls) - least <= 1e-5 * before


@pytest.mark.e2e
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("name", "path", "layers"), PARTS)
def test_a_turn_ends_at_the_least_squares_error(name: str, path: str, layers: tuple[str, ...], turn: int) -> None:
    check_one_layer(name, path, layers, turn)


def some_metric(full: bool) -> OutputMetric:
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(100, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16).double()
    return OutputMetric.from_samples(gradients, full=full)


@pytest.mark.e2e
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("full", [False, True])
def test_a_metric_weighs_the_error(full: bool, turn: int) -> None:
    layers, metric = ("up_proj", "down_proj"), some_metric(full)
    module, calls = damaged("llama", "mlp", layers[turn : turn + 1], torch.float64)
    root = torch.linalg.cholesky(metric.matrix).T
    least, before = least_squares(module, layers[turn], calls, root), error_of(module, calls, root)
    with torch.no_grad():
        refinement._Turn(ModuleLoss(module, calls, calls, metric), 600, 0.0).take(layers[turn:], before)
    assert -1e-9 * before <= error_of(module, calls, root) - least <= 1e-5 * before


@pytest.mark.parametrize("full", [None, False, True])
@pytest.mark.parametrize(("name", "path", "layers"), PARTS)
@torch.no_grad()
def test_the_moments_say_what_passes_would(name: str, path: str, layers: tuple[str, ...], full: bool | None) -> None:
    module, calls = damaged(name, path, layers, torch.float64)
    fit, apart = calls.split(1)
    loss = ModuleLoss(module, fit, apart, None if full is None else some_metric(full))
    layer: nn.Linear = module.get_submodule(layers[-1])  # type: ignore[assignment]
    short, long = OutputLayer(loss, layer, loss.error(apart)), InnerLayer(loss, layers[-1:])
    step = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(short.gradient, long.gradient, **exact)
    torch.testing.assert_close(short.gram, long.gram, **exact)
    torch.testing.assert_close(short.product(step), long.product(step), **exact)
    assert short.trace(step) == pytest.approx(long.trace(step), rel=1e-9)
    assert short.fit_error == pytest.approx(long.fit_error, rel=1e-9)
    assert short.fit_error == pytest.approx(loss.error(fit), rel=1e-9)
    moved = layer.weight.detach() + step
    assert short.held_out(moved) == pytest.approx(long.held_out(moved), rel=1e-9)


@pytest.mark.parametrize("full", [None, False, True])
@torch.no_grad()
def test_the_effect_of_the_output_layer_is_the_metric(full: bool | None) -> None:
    """Drawn with signs, within what so many tokens leave open: 5 / sqrt(tokens) of the largest variance."""
    module, calls = damaged("llama", "mlp", ("up_proj", "down_proj"), torch.float64)
    metric = None if full is None else some_metric(full)
    loss = ModuleLoss(module, calls, calls, metric)
    known = OutputLayer(loss, module.down_proj, 0.0).outputs()
    assert (known is None) == (metric is None)
    exact = torch.eye(16).double() if known is None else known
    drawn = InnerLayer(loss, ("down_proj",)).outputs()
    assert float((drawn - exact).abs().max()) <= 5 * calls.tokens**-0.5 * float(exact.diagonal().max())


@pytest.mark.parametrize(("name", "path", "layers"), [part for part in PARTS if part[1] == "mlp"])
def test_a_step_that_knows_its_outputs_goes_further(
    name: str, path: str, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    for known in (True, False):
        module, calls = damaged(name, path, layers, torch.float64)
        if not known:
            monkeypatch.setattr(InnerLayer, "outputs", lambda self: torch.eye(self.layer.out_features).double())
        before = error_of(module, calls)
        with torch.no_grad():
            refinement._Turn(ModuleLoss(module, calls, calls, None), 1, 0.01).take(layers, before)
        errors.append(error_of(module, calls) / before)
    assert errors[0] < errors[1]


FAULTS = ["biases are counted", "the step is doubled", "the last step is doubled", "the mask is forgotten"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "biases are counted":
        monkeypatch.setattr(refinement, "_without_biases", lambda module, layers: torch.no_grad())
    elif fault.endswith("is doubled"):
        place = OutputLayer if "last" in fault else InnerLayer
        honest = place.product
        monkeypatch.setattr(place, "product", lambda *args: honest(*args) / 2)
    else:
        monkeypatch.setattr(refinement.torch, "where", lambda mask, yes, no: yes)
    with pytest.raises((AssertionError, RuntimeError)):
        for turn in (0, 1):
            check_one_layer("qwen2", "self_attn", ("v_proj", "o_proj"), turn)
        check_masks("qwen2", "self_attn", ("v_proj", "o_proj"))


def check_masks(name: str, path: str, layers: tuple[str, ...]) -> None:
    module, calls = damaged(name, path, layers, torch.float32)
    before = copy.deepcopy(module)
    fit, apart = calls.split(1)
    with torch.no_grad():
        part = recover(module, layers, fit, apart, rounds=3)
    for layer, old in zip(layers, [before.get_submodule(layer) for layer in layers], strict=True):
        now = module.get_submodule(layer)
        assert ((now.weight != 0) == (old.weight != 0)).all()
        assert now.bias is None or torch.equal(now.bias, old.bias)
    assert part.error_after <= part.error_before * (1 + 1e-5)
    assert part.held_out_after <= part.held_out_before
    assert part.held_out_after == pytest.approx(error_of(module, apart) / error_of_nothing(apart), rel=1e-4)
    assert part.steps > 0


def error_of_nothing(calls: Calls) -> float:
    return sum(float(target.square().sum()) for target in calls.targets) / calls.tokens


@pytest.mark.parametrize(("name", "path", "layers"), PARTS)
def test_no_error_rises_and_masks_stay(name: str, path: str, layers: tuple[str, ...]) -> None:
    check_masks(name, path, layers)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "path", "layers"), PARTS)
def test_errors_are_those_of_the_weights_as_they_are_rounded(
    name: str, path: str, layers: tuple[str, ...], dtype: torch.dtype, rounds: int
) -> None:
    module, calls = damaged(name, path, layers, torch.float32)
    module.to(dtype).float()
    fit, apart = calls.split(1)
    with torch.no_grad():
        part = recover(module, layers, fit, apart, rounds=rounds, dtype=dtype)
    assert part.steps > 0
    assert all(torch.equal(weight, weight.to(dtype).float()) for weight in module.parameters())
    assert part.held_out_after < part.held_out_before
    assert part.held_out_after == pytest.approx(error_of(module, apart) / error_of_nothing(apart), rel=1e-4)
    # Without the rounding of the last turn it is another by up to 1e-4; the sums round to below 1e-6.
    assert part.error_after == pytest.approx(error_of(module, fit) / error_of_nothing(fit), rel=1e-5)


def test_nothing_moves_where_nothing_was_pruned() -> None:
    model = TINY_MODELS["llama"]()
    decoder = Decoder(model)
    with calibrating(decoder):
        calls = calls_of(decoder.blocks[0], "mlp", first_inputs(decoder, batches(length=24)))
        weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        part = recover(model.model.layers[0].mlp, ["up_proj", "down_proj"], *calls.split(1))
    assert part.steps == 0
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "recipe", "settings", "parts"),
    [
        ("llama", "fasp", {"units": "all"}, 4),
        ("llama", "fasp", {"units": "mlp"}, 2),
        ("qwen2", "sparsegpt", {"sparsity": 0.5}, 4),
        ("opt", "wanda", {"sparsity": 0.5}, 2),
    ],
)
def test_a_run_recovers_what_it_pruned(name: str, recipe: str, settings: dict, parts: int, policy: str) -> None:
    plain, recovered = TINY_MODELS[name](), TINY_MODELS[name]()
    settings = {**settings, "refit.held_out": 0.25, "propagation": policy}
    prune(plain, batches(8, 96), load_recipe(recipe, settings))
    report = prune(recovered, batches(8, 96), load_recipe(recipe, {**settings, "refit.recovery": 1}))
    assert len(report.recovered) == parts
    for part in report.recovered:
        assert part.held_out_after <= part.held_out_before
        assert part.error_after <= part.error_before * (1 + 1e-5)
    assert json.loads(report.to_json())["recovered"][0]["name"] == report.recovered[0].name
    assert any(part.steps for part in report.recovered)
    states = zip(plain.state_dict().items(), recovered.state_dict().values(), strict=True)
    for (key, before), after in states:
        assert before.shape == after.shape
        if "norm" in key or "embed" in key:
            assert torch.equal(before, after)


def test_recovery_asks_for_what_it_needs() -> None:
    with pytest.raises(InputError, match="held_out"):
        load_recipe("fasp", {"refit.recovery": 1})
    settings = {"units": "mlp", "refit.recovery": 1, "refit.held_out": 0.25}
    with pytest.raises(StrictError, match="nothing to refit"):
        prune(TINY_MODELS["opt"](), batches(length=24), load_recipe("fasp", {**settings, "strict": True}))


@pytest.mark.parametrize(("share", "apart"), [(0.01, 1), (0.25, 2), (0.375, 3), (0.5, 4), (0.8, 6)])
def test_the_last_sequences_are_held_out(share: float, apart: int) -> None:
    given = batches(4, 24)
    cut, held = hold_out(given, share)
    assert torch.equal(torch.cat(cut), torch.cat(given))
    assert torch.equal(torch.cat(cut[-held:]), torch.cat(given)[-apart:])
    report = prune(TINY_MODELS["llama"](), given, load_recipe("fasp", {"refit.held_out": share}))
    assert all(layer.tokens == (8 - apart) * 24 for layer in report.layers)


def test_one_sequence_at_least_is_left() -> None:
    with pytest.raises(InputError, match="leaves none for calibration"):
        prune(TINY_MODELS["llama"](), batches(1, 24), load_recipe("fasp", {"refit.held_out": 0.9}))


@pytest.mark.parametrize("policy", POLICIES)
def test_recovery_sees_what_a_block_without_its_attention_passes_on(policy: str) -> None:
    dense = TINY_MODELS["llama"]()
    model, bare = copy.deepcopy(dense), Decoder(copy.deepcopy(dense))
    decoder = Decoder(model)
    shape = decoder.shape(0)
    narrow = BlockAllocation(replace(shape.without("attention"), mlp_width=96))
    allocation = Allocation.of(decoder, [narrow, BlockAllocation(decoder.shape(1))])
    settings = {"refit.recovery": 1, "refit.held_out": 0.25, "propagation": policy}
    report = prune(model, batches(8, 96), load_recipe("fasp", settings), allocation=allocation)
    bare.remove(0, "attention")
    part = report.recovered[0]
    assert part.name == decoder.name(0, "mlp")
    used, count = hold_out(batches(8, 96), 0.25)
    with calibrating(bare), torch.no_grad():
        calls = calls_of(bare.blocks[0], "mlp", first_inputs(bare, used))
        if POLICIES[policy].dense_target:
            whole = Decoder(dense)
            goals = calls_of(whole.blocks[0], "mlp", first_inputs(whole, used)).targets
            share = POLICIES[policy].correction
            mixed = [(1 - share) * own + share * goal for own, goal in zip(calls.targets, goals, strict=True)]
            calls = Calls(calls.arguments, States(goals.place, mixed))
        for found, error in zip(calls.split(count), (part.error_after, part.held_out_after), strict=True):
            expected = torch.cat([target.reshape(-1) for target in found.targets])
            change = answers(model.model.layers[0].mlp, found) - expected
            assert float(change.square().sum() / expected.square().sum()) == pytest.approx(error, rel=1e-4)


def test_a_sub_module_that_answers_nothing_is_no_division_by_zero() -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    report = prune(
        model, batches(length=24), load_recipe("fasp", {"units": "mlp", "refit.recovery": 1, "refit.held_out": 0.25})
    )
    assert [part.error_after for part in report.recovered[1:]] == [0.0]
