"""Value dimensions from a rotated basis: the same shapes as coordinates, smaller errors, and a model that has them."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import optprune
from optprune.allocation.width_costs import WidthBudget, WidthCosts
from optprune.calibration import Change, DenseStatistics
from optprune.models import UNITS, Decoder
from optprune.report import Report
from tests.helpers.heard_calls import heard
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS
from tests.helpers.token_batches import batches

POLICIES = ("dense", "pruned", "intra", "cross", "partial", "local")
ROWS_OF_ONE_LAYER = TINY_MODELS | {name: ALL_MODELS[name] for name in ("phi3", "gpt_neox")}
by_model = pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS)


def pruned(model: PreTrainedModel, units: str, **fields: object) -> tuple[PreTrainedModel, Report]:
    model = copy.deepcopy(model)
    recipe = optprune.Recipe(units=units, **{"sparsity": 0.08, **fields})
    return model, optprune.prune(model, batches(), recipe)


def attention_outputs(model: PreTrainedModel, block: int) -> list[Tensor]:
    """What the attention of a block answers, for the batches."""
    decoder = Decoder(model)
    return [answer for _, answer in heard(model, decoder.layer(block, decoder.architecture.output))]


@pytest.mark.e2e
@by_model
@pytest.mark.parametrize("policy", POLICIES)
def test_every_layer_loses_less_than_by_coordinates(make, policy: str) -> None:
    model = make()
    _, plain = pruned(model, "vo", propagation=policy)
    _, rotated = pruned(model, "rotated-vo", propagation=policy)
    assert [layer.kept for layer in rotated.layers] == [layer.kept for layer in plain.layers]
    assert rotated.sparsity_reached == plain.sparsity_reached
    # The first layer has the same inputs in both.
    assert rotated.layers[0].objective < 0.9 * plain.layers[0].objective


@pytest.mark.parametrize("make", ROWS_OF_ONE_LAYER.values(), ids=ROWS_OF_ONE_LAYER)
def test_the_model_answers_as_the_report_says(make) -> None:
    """The error of the first block's attention, by a forward pass of what was written, is the one solved for."""
    model = make()
    found, report = pruned(model, "rotated-vo", propagation="dense")
    error = signal = 0.0
    dense = torch.cat(attention_outputs(model, 0)).double()
    change = torch.cat(attention_outputs(found, 0)).double() - dense
    if Decoder(model).layer(0, Decoder(model).architecture.output).bias is not None:
        # A fitted bias: of centred outputs.
        change, dense = change - change.mean(0), dense - dense.mean(0)
    error, signal = float(change.square().sum()), float(dense.square().sum())
    assert error / signal == pytest.approx(report.layers[0].relative_error, rel=1e-3)
    assert report.layers[0].relative_error > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_held_out_error_is_that_of_a_pass(name: str) -> None:
    """On the sequences kept apart, which the moments of rotated inputs stand for."""
    model = TINY_MODELS[name]()
    found, report = pruned(model, "rotated-vo", propagation="dense", refit=0.25)
    dense, answers = (attention_outputs(each, 0)[-1].double() for each in (model, found))
    error = float((answers - dense).square().sum() / dense.square().sum())
    assert report.layers[0].held_out_error == pytest.approx(error, rel=1e-3)
    assert not torch.equal(found.model.layers[0].self_attn.v_proj.weight, model.model.layers[0].self_attn.v_proj.weight)


@by_model
def test_one_budget_with_probes_and_a_metric(make) -> None:
    model = make()
    fields = {"allocation": "global", "allocation.probe_tokens": 64, "metric": "full", "sparsity": 0.2}
    _, plain = pruned(model, "all", **fields)
    found, rotated = pruned(model, "rotated-all", **fields)
    assert rotated.sparsity_reached == pytest.approx(plain.sparsity_reached, abs=0.02)
    with torch.no_grad():
        assert bool(torch.isfinite(found(input_ids=batches()[0]).logits).all())


class Heard:
    """A probe that keeps what it is given to try."""

    def __init__(self) -> None:
        self.changes = list[Change]()

    def try_out(self, changes: list[Change]) -> None:
        self.changes += changes


@by_model
def test_a_probe_tries_what_loses_as_much_as_the_curve_says(make) -> None:
    """Weights of coordinates again, for the inputs as they are in the dense model."""
    model, units = make(), UNITS["rotated-vo"]
    decoder, probe = Decoder(model), Heard()
    [target] = units.candidates(decoder, 0)
    loss = optprune.layer_loss(model, batches(), decoder.name(0, target.path), "dense")
    costs = WidthCosts(WidthBudget(units, 0.3, 0.2, None, "parameters", 512), decoder, DenseStatistics(), probe, False)  # type: ignore[arg-type]
    costs.add(0, target, loss)
    costs.close()
    [(_, _, count)], [change] = costs.tried, probe.changes
    assert loss.value(change.weight) == pytest.approx(costs.widths[0].losses[count], rel=1e-3)
    # As many directions of every head as are kept.
    for head in change.weight.split(decoder.shape(0).value_dim, dim=1):
        assert int(torch.linalg.matrix_rank(head.double(), rtol=1e-4)) == count


def test_a_basis_that_loses_more_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the directions, no layer loses more than by coordinates, and the model is then the same."""
    from optprune.problems import Rotation
    from optprune.pruning import layer as module

    def senseless(loss, channels, keep):
        matrices = torch.full((channels.slot_count, *2 * (channels.units // channels.slot_count,)), 0.0)
        generator = torch.Generator().manual_seed(1)
        matrices += torch.linalg.qr(torch.randn(matrices.shape, generator=generator))[0]
        return Rotation.of(matrices, channels)

    model = TINY_MODELS["llama"]()
    with torch.no_grad():  # what a few value dimensions make, by coordinates, is nothing: nothing beats those
        for block in model.model.layers:
            block.self_attn.v_proj.weight[8:16] *= 1e-3
            block.self_attn.v_proj.weight[24:] *= 1e-3
    plain, _ = pruned(model, "vo")
    monkeypatch.setattr(module, "best_basis", senseless)
    rotated, _ = pruned(model, "rotated-vo")
    for one, other in zip(plain.parameters(), rotated.parameters(), strict=True):
        assert torch.equal(one, other)


def test_all_dimensions_stay_as_they_are() -> None:
    """Where an allocation keeps them all, nothing is rotated."""
    model = TINY_MODELS["llama"]()
    found, report = pruned(model, "rotated-all", propagation="local", sparsity=0.01, allocation="global", metric="full")
    shapes = list(Decoder(found).shapes())
    for block, shape in enumerate(shapes):
        if shape.value_dim == 16:
            before = model.model.layers[block].self_attn.v_proj.weight
            assert torch.equal(found.model.layers[block].self_attn.v_proj.weight, before)
    assert any(shape.value_dim == 16 for shape in shapes), report


def test_half_precision_models_hold_rounded_rotated_rows() -> None:
    model = TINY_MODELS["qwen2"]().to(torch.bfloat16)
    found, report = pruned(model, "rotated-vo")
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}
    _, plain = pruned(model, "vo")
    assert report.layers[0].relative_error < plain.layers[0].relative_error


def test_dead_inputs_are_told_as_they_are_in_the_model() -> None:
    """A value dimension that is zero on every token is two dead inputs; rotated they would be zero to rounding."""
    model = TINY_MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3] = 0
    found, report = pruned(model, "rotated-vo")
    assert not torch.equal(found.model.layers[0].self_attn.v_proj.weight, model.model.layers[0].self_attn.v_proj.weight)
    first = report.layers[0]
    assert first.dead_inputs == 2
    assert "2 inputs were zero on every calibration token" in first.notes
