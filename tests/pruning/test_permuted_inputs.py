"""Permuted inputs under N:M: the dense model is what it was, groups hold what can be spared, and layers lose less."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import optprune
from optprune.errors import InputError, StrictError
from optprune.models import Decoder, load_model, open_model, reorderable
from optprune.pruning import layer as layers
from optprune.report import Report, model_patterns
from tests.helpers.heard_calls import heard
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_llama, tiny_opt, tiny_qwen2
from tests.helpers.token_batches import batches

ANSWERS = [*(("llama", policy) for policy in ("intra", "cross", "local")), ("opt", "intra"), ("gpt_neox", "intra")]
"""policies under which a layer's inputs are those that it gets in the end; biases, rows of joined layers"""
SPREAD = ("llama", "gpt2", "phi3", "gpt_neox", "mixtral")
"""rows of layers of their own and of joined ones, matrices that are held transposed, experts"""


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Value dimensions and MLP units four strong and four weak by turns: the order in which 2:4 loses most."""
    decoder = Decoder(model)
    with torch.no_grad():
        for block in range(len(decoder.blocks)):
            for path in decoder.paths(block):
                if reorderable(decoder, block, path, 4) is not None:
                    weight = decoder.layer(block, path).weight
                    weight *= torch.where(torch.arange(weight.shape[1]) % 8 < 4, 1.0, 0.2)
    decoder.joined()
    return model


def pruned(model: PreTrainedModel, recipe: str = "wanda", **fields: Any) -> tuple[PreTrainedModel, Report]:
    model = copy.deepcopy(model)
    report = optprune.prune(model, batches(), optprune.load_recipe(recipe, {"units.weights": "2:4", **fields}))
    return model, report


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]).logits


def answers(model: PreTrainedModel, path: str, first: int = 0) -> Tensor:
    """What a layer of the first block makes of its inputs, without its bias, for the batches from a first one on."""
    layer = Decoder(model).layer(0, path)
    inputs = torch.cat([given for given, _ in heard(model, layer)][first:]).double()
    return inputs @ layer.weight.detach().double().T


def objectives(report: Report) -> dict[str, float]:
    return {layer.name: layer.objective for layer in report.layers}


@pytest.mark.parametrize("make", ALL_MODELS.values(), ids=ALL_MODELS)
def test_the_dense_model_answers_as_before(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer keeps all its weights, in the order that was found for the pattern."""
    real = layers.solve

    def keeping_all(problem, solver):
        solution = real(problem, solver)
        object.__setattr__(solution, "value", problem.loss.weight.clone())
        return solution

    monkeypatch.setattr(layers, "solve", keeping_all)
    model = uneven(make())
    before = dict(model.named_parameters())
    found, _ = pruned(model, permuted=True)
    # By norms: sums in another order may differ more in a single small number, by another processor's kernels.
    expected = logits(model)
    assert float((logits(found) - expected).norm()) <= 1e-5 * float(expected.norm())
    moved = {name for name, weight in found.named_parameters() if not torch.equal(weight, before[name])}
    decoder = Decoder(found)
    for block in range(len(decoder.blocks)):
        values = (decoder.architecture.output, decoder.architecture.value)
        moving = () if "value_dim" in decoder.architecture.indivisible else values
        for path in (*moving, decoder.architecture.mlp_consumer):
            if path in decoder.paths(block):
                assert f"{decoder.name(block, path)}.weight" in moved, (path, moved)
    if decoder.architecture.mixture is not None:
        assert any("experts" in name for name in moved)


@pytest.mark.parametrize("name", SPREAD)
def test_layers_lose_less_and_keep_the_pattern(name: str) -> None:
    model = uneven(ALL_MODELS[name]())
    _, plain = pruned(model, propagation="dense")
    found, permuted = pruned(model, permuted=True, propagation="dense")
    decoder = Decoder(found)
    assert all("2:4" in layer.patterns for layer in model_patterns(decoder))
    before, after = objectives(plain), objectives(permuted)
    assert before.keys() == after.keys()
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            own = decoder.name(block, path)
            if reorderable(decoder, block, path, 4) is not None:
                # Another path of the first block's inputs changes nothing; those of the second are the dense ones too.
                assert after[own] < 0.8 * before[own], own
            else:
                assert after[own] == pytest.approx(before[own], rel=1e-5), own


@pytest.mark.parametrize(("name", "policy"), ANSWERS)
def test_the_model_answers_as_the_report_says(name: str, policy: str) -> None:
    """The errors of the first block's two sub-modules, by a forward pass of what was written, are those solved for."""
    model = uneven(ALL_MODELS[name]())
    found, report = pruned(model, "sparsegpt", permuted=True, propagation=policy)
    architecture = Decoder(model).architecture
    errors = {layer.name: layer.relative_error for layer in report.layers}
    for path in (architecture.output, architecture.mlp_consumer):
        dense, other = (answers(each, path) for each in (model, found))
        error = float((other - dense).square().sum() / dense.square().sum())
        assert error == pytest.approx(errors[f"{architecture.blocks}.0.{path}"], rel=1e-3)
        assert error > 0.01


def test_the_held_out_error_is_that_of_a_pass() -> None:
    """On the sequences kept apart, which the moments of permuted inputs stand for: the last batch of four."""
    model = uneven(tiny_llama())
    found, report = pruned(model, "sparsegpt", permuted=True, propagation="local", refit=0.25)
    architecture = Decoder(model).architecture
    errors = {layer.name: layer.held_out_error for layer in report.layers}
    for path in (architecture.output, architecture.mlp_consumer):
        dense, other = (answers(each, path, first=3) for each in (model, found))
        error = float((other - dense).square().sum() / dense.square().sum())
        assert errors[f"{architecture.blocks}.0.{path}"] == pytest.approx(error, rel=1e-3)


@pytest.mark.e2e
def test_all_is_in_place_with_recovery_and_a_budget() -> None:
    model = uneven(tiny_qwen2())
    fields = {
        "refit.held_out": 0.25,
        "refit.recovery": 1,
        "metric": "full",
        "allocation": "global",
    }
    found, report = pruned(model, "alps", permuted=True, sparsity=0.4, **fields)
    plain, _ = pruned(model, "alps", sparsity=0.4, **fields)
    assert report.sparsity_reached == pytest.approx(0.4, abs=0.03)
    assert all("2:4" in layer.patterns or not layer.zeros for layer in model_patterns(Decoder(found)))
    divergence = [(logits(each) - logits(model)).square().mean() for each in (found, plain)]
    assert divergence[0] < divergence[1]


def test_rows_that_are_forgotten_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: layers that make inputs stay as they were. The model then answers another thing than its layers."""
    model = uneven(tiny_opt())
    right, _ = pruned(model, "alps", permuted=True)
    monkeypatch.setattr(layers, "_apply_basis", lambda *_: None)
    wrong, _ = pruned(model, "alps", permuted=True)
    error = [float((logits(each) - logits(model)).square().mean()) for each in (right, wrong)]
    assert error[0] < 0.5 * error[1]


# -- where it does not hold


def test_heads_of_no_whole_groups_stay_as_they_are_with_a_note() -> None:
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=4, head_dim=18, hidden_size=64)
    fields = {"units.weights": "4:8", "permuted": True}
    found, report = pruned(model, **fields)
    note = (
        "permuted leaves the value dimensions of 2 blocks in their order, as those of model.layers.0.self_attn.o_proj: "
        "18 in a head are no whole groups of 8"
    )
    assert note in report.notes
    with pytest.raises(StrictError, match="18 in a head are no whole groups of 8"):
        pruned(model, strict=True, **fields)
    kept = found.model.layers[0].self_attn.v_proj.weight
    before = model.model.layers[0].self_attn.v_proj.weight
    assert torch.equal(kept[kept != 0], before[kept != 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": "mlp"}, "permuted needs an N:M pattern, but units mlp have no pattern"),
        ({"units": "weights"}, "units weights have the pattern unstructured: set units.weights to an N:M"),
        ({"units": {"weights": "rows"}}, "the pattern rows"),
    ],
)
def test_what_has_no_groups_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optprune.Recipe(permuted=True, sparsity=0.5, **fields)


def test_it_is_off_where_nobody_asks_and_where_nothing_goes() -> None:
    assert optprune.load_recipe("sparse_best", {"units.weights": "2:4"}).permuted is False
    model = uneven(tiny_llama())
    found, _ = pruned(model, permuted=True, sparsity=0.0)
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_whose_blocks_are_still_in_its_files_is_pruned_alike(tmp_path: Path) -> None:
    model = uneven(tiny_llama())
    save_tiny(model, tmp_path)
    recipe = optprune.load_recipe("wanda", {"units.weights": "2:4", "permuted": True})
    whole, opened = load_model(tmp_path), open_model(tmp_path)
    reports = [optprune.prune(one.model, batches(), recipe, store=one.store) for one in (whole, opened)]
    assert objectives(reports[0]) == objectives(reports[1])
    assert not any("permuted" in note for note in reports[1].notes)
