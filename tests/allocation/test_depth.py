"""Depth: whole sub-blocks removed by a score, against scores measured another way."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optprune.allocation import DenseModel
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.measure import perplexity
from optprune.models import Decoder, load_model
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.recipe.recipe import allocator_of
from optprune.report import PhaseAdvanced, Report
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama, tiny_opt
from tests.helpers.token_batches import batches

ONE_EACH = {"attention": 64 * 3 * 64, "mlp": 64 * 3 * 128}
"""linear weights of the sub-blocks of the tiny Llama"""


def silenced(model: PreTrainedModel, parts: list[tuple[int, str]]) -> PreTrainedModel:
    """A copy whose sub-blocks add nothing, because their last layer is zero."""
    model = copy.deepcopy(model)
    decoder = Decoder(model)
    last = {"attention": decoder.architecture.output, "mlp": decoder.architecture.mlp_consumer}
    with torch.no_grad():
        for block, part in parts:
            for parameter in decoder.layer(block, last[part]).parameters():
                parameter.zero_()
    return model


def removed(report: Report) -> list[tuple[int, str]]:
    return [(entry.block, entry.part) for entry in report.removed]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_each_removal_is_the_one_that_costs_the_least_perplexity(name: str) -> None:
    dense = TINY_MODELS[name](num_hidden_layers=3)
    tokens = torch.cat(batches())[:2]
    model = copy.deepcopy(dense)
    report = prune(model, batches(), load_recipe("depth", {"sparsity": 0.45, "allocation.score_tokens": 2 * 48}))
    gone = removed(report)
    assert len(gone) >= 2
    every = [(block, part) for block in range(3) for part in ("attention", "mlp")]
    for position, entry in enumerate(report.removed):
        before = gone[:position]
        scores = {
            each: perplexity(silenced(dense, [*before, each]), tokens).perplexity
            for each in every
            if each not in before
        }
        assert entry.score == pytest.approx(scores[gone[position]], rel=1e-5)
        # Nothing of the same size, and so nothing that fits as well, would have cost less.
        assert entry.score <= min(score for (_, part), score in scores.items() if part == entry.part) * (1 + 1e-6)
    with torch.no_grad():
        left, silent = model(tokens).logits, silenced(dense, gone)(tokens).logits
    assert (left - silent).abs().max() <= 1e-5 * silent.abs().max()
    assert report.layers == ()
    assert report.sparsity_reached == pytest.approx(
        sum(entry.weights for entry in report.removed) / Decoder(dense).linear_weights(), abs=1e-12
    )


def hidden_states(model: PreTrainedModel, batch: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
    """Before a block, between its attention and its MLP, and after it: read off the inputs of its norms."""
    caught: list[torch.Tensor] = []
    layer = model.model.layers[block]
    handles = [
        module.register_forward_pre_hook(lambda _, args: caught.append(args[0].double()))
        for module in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    handles.append(layer.register_forward_hook(lambda _, args, output: caught.append(output.double())))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return tuple(caught)


@pytest.mark.parametrize("parts", ["attention", "mlp", "both", "layers"])
def test_influence_is_one_minus_the_cosine_over_all_tokens(parts: str) -> None:
    model = tiny_llama(num_hidden_layers=4)
    recipe = load_recipe("depth", {"allocation.score": "influence", "allocation.parts": parts, "sparsity": 0.25})
    scores: dict[tuple[int, str], float] = {}
    for block in range(4):
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches():
            before, between, after = hidden_states(model, batch, block)
            pairs = ((before, between), (between, after), (before, after))
            sums += torch.stack([(1 - torch.cosine_similarity(a, b, dim=-1)).sum() for a, b in pairs])
        attention, mlp, layer = (sums / sum(batch.numel() for batch in batches())).tolist()
        scores[block, "attention"], scores[block, "mlp"] = (layer, layer) if parts == "layers" else (attention, mlp)
    report = prune(model, batches(), recipe)
    for entry in report.removed:
        assert entry.score == pytest.approx(scores[entry.block, entry.part], rel=1e-4)
    if parts in ("attention", "mlp"):
        able = sorted(score for (_, part), score in scores.items() if part == parts)
        assert [entry.score for entry in report.removed] == pytest.approx(able[: len(report.removed)], rel=1e-4)
    if parts == "layers":
        assert [entry.block for entry in report.removed] == [min(range(4), key=lambda b: scores[b, "mlp"])] * 2


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("parts", ["attention", "mlp", "both", "layers"])
def test_no_further_removal_would_come_nearer_to_the_budget(parts: str, sparsity: float) -> None:
    model = tiny_llama(num_hidden_layers=4)
    total = Decoder(model).linear_weights()
    recipe = load_recipe("depth", {"allocation.score": "influence", "allocation.parts": parts, "sparsity": sparsity})
    if parts == "layers" and sparsity == 0.1:
        with pytest.raises(InputError, match="less than half of the smallest sub-block"):
            prune(model, batches(), recipe)
        return
    report = prune(model, batches(), recipe)
    left = Decoder(model).shapes()
    steps = []
    if parts in ("attention", "both") and sum(shape.kv_heads > 0 for shape in left) > 1:
        steps.append(ONE_EACH["attention"])
    if parts in ("mlp", "both") and any(shape.mlp_width for shape in left):
        steps.append(ONE_EACH["mlp"])
    if parts == "layers" and len(left) > 1:
        steps.append(sum(ONE_EACH.values()))
    away = abs(report.sparsity_reached - sparsity)
    assert all(abs(report.sparsity_reached + step / total - sparsity) >= away - 1e-12 for step in steps)
    assert any(shape.kv_heads for shape in left)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_whole_layers_leave_a_stock_model(name: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name](num_hidden_layers=4)
    recipe = load_recipe("depth", {"allocation.parts": "layers", "allocation.score": "influence", "sparsity": 0.5})
    report = prune(model, batches(), recipe)
    assert model.config.num_hidden_layers == 2
    assert len(report.removed) == 4
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(batches()[0]).logits, model(batches()[0]).logits)


def test_choosing_changes_nothing_and_reports_progress() -> None:
    model = tiny_opt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    events: list[object] = []
    division = allocator_of(load_recipe("depth", {"sparsity": 0.3})).divide(
        DenseModel(Decoder(model), batches(), on_event=events.append)
    )
    allocation, chosen = division.allocation, division.removed
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights, budget = sum(entry.weights for entry in chosen), round(0.3 * Decoder(model).linear_weights())
    counts = [0]  # none is chosen yet
    for entry in chosen:
        counts.append(counts[-1] + entry.weights)
    step = "choosing sub-blocks to remove"
    assert events == [PhaseAdvanced("budget", step, "weight", count, budget) for count in counts]
    assert allocation.sparsity == pytest.approx(weights / Decoder(model).linear_weights())


def test_a_choice_of_depth_can_be_narrowed_further() -> None:
    """Depth gives an allocation like any other: it is given back with narrower MLPs."""
    model = tiny_llama(num_hidden_layers=3)
    recipe = load_recipe("depth", {"sparsity": 0.15, "allocation.parts": "attention"})
    division = allocator_of(recipe).divide(DenseModel(Decoder(model), batches()))
    allocation, chosen = division.allocation, division.removed
    blocks = tuple(
        type(block)(type(block.shape)(64, block.shape.kv_heads, block.shape.value_dim)) for block in allocation.blocks
    )
    both = type(allocation).of(Decoder(model), blocks)
    report = prune(model, batches(), Recipe(), allocation=both)
    shapes = Decoder(model).shapes()
    assert [shape.kv_heads == 0 for shape in shapes] == [
        any(entry.block == block for entry in chosen) for block in range(3)
    ]
    assert {shape.mlp_width for shape in shapes} == {64}
    assert report.sparsity_reached == pytest.approx(both.sparsity, abs=1e-12)


@pytest.mark.e2e
def test_the_command_line_removes_sub_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text, output = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Prices rose again in March, the office said. " * 200)
    options = ["--samples", "4", "--seq-length", "64", "--recipe", "depth", "--sparsity", "0.2"]
    assert main(["prune", str(folder), "--calibration", str(text), "--output", str(output), *options]) == 0
    assert "16.67% of the decoder's linear weights removed" in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert [entry["part"] for entry in report["removed"]] == ["attention"]
    shapes = Decoder(load_model(output, device="cpu").model).shapes()
    assert [shape.counts(("experts",)) for shape in shapes] == report["allocation"]["blocks"]
