"""Checkpoints in half precision: gradients, probes and recovery are computed in float32, what is written is rounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optprune.allocation import currency
from optprune.calibration import Stream
from optprune.models import Decoder, LoadedModel, load_model, open_model
from optprune.pruning import Journal, Processes, layer_problem, prune
from optprune.recipe import Recipe, load_recipe
from optprune.report import Event, LayerSolved, Report
from tests.helpers.recipes import ANY_MODEL
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.weights import weights_of

USUAL = ("alps", "fasp", "gptq", "sparse_best", "structured_best")
"""the recipes of each structure; `make test-all` has the others"""
SETTINGS: dict[str, dict[str, Any]] = {
    "depth": {"sparsity": 0.3},
    "structured_best": {"sparsity": 0.3, "allocation.least": 0.2, "allocation.probe_tokens": 50},
}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("sparse_best", {"refit.held_out": 0.25}),
    "weights with probes": ("sparse_best", {"units.weights": "2:4", "sparsity": 0.4, "allocation.probe_tokens": 50}),
    "units with probes": ("structured_best", SETTINGS["structured_best"]),
    "probes alone": ("structured_best", {**SETTINGS["structured_best"], "metric": "none"}),
}


def half(folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    TINY_MODELS[name]().to(dtype).save_pretrained(folder)
    return folder


def pruned(loaded: LoadedModel, recipe: Recipe, **options: Any) -> tuple[Report, dict[str, Tensor]]:
    report = prune(loaded.model, batches(), recipe, store=loaded.store, **options)
    return report, weights_of(loaded.decoder())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
    )


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ANY_MODEL]
)
def test_every_recipe_prunes_a_bfloat16_checkpoint_streamed_as_in_memory(name: str, tmp_path: Path) -> None:
    folder, recipe = half(tmp_path), load_recipe(name, SETTINGS.get(name, {}))
    report, whole = pruned(load_model(folder), recipe)
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    assert report.sparsity_reached == pytest.approx(recipe.sparsity, abs=0.15)
    assert equal(pruned(open_model(folder), recipe)[1], whole)


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", EXACT)
def test_the_weights_are_those_of_a_run_in_float32_rounded(run: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From dense inputs nothing depends on what was written before, so that only the rounding is another."""
    folder, (name, settings) = half(tmp_path, dtype=dtype), EXACT[run]
    recipe = load_recipe(name, {**settings, "propagation": "dense"})
    report, found = pruned(load_model(folder), recipe)
    expected, single = pruned(load_model(folder, dtype="float32"), recipe)
    assert report.allocation == expected.allocation
    assert equal(found, {key: value.to(dtype) for key, value in single.items()})


@pytest.mark.parametrize("name", TINY_MODELS)
def test_later_layers_and_blocks_see_answers_as_they_are_rounded(name: str) -> None:
    model = TINY_MODELS[name]().to(torch.bfloat16)
    solved, settings = [], {"propagation": "cross", "metric": "diagonal"}

    def look(event: Event) -> None:
        if isinstance(event, LayerSolved):
            layer = model.get_submodule(event.layer.name)
            solved.append(layer)
            for value in layer.parameters():
                assert value.dtype == torch.float32
                assert torch.equal(value, value.bfloat16().float())

    prune(model, batches(), load_recipe("sparsegpt", settings), on_event=look)
    assert len(solved) == 2 * len(Decoder(model).architecture.layers)


def test_time_is_measured_in_the_dtype_that_the_model_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def seconds(decoder: Decoder, block: int, stream: Stream) -> float:
        weights = list(decoder.blocks[block].parameters())
        # Rotary pairs are listed by whole numbers.
        seen.update([stream.hidden[0].dtype, *(weight.dtype for weight in weights if weight.is_floating_point())])
        return float(sum(weight.numel() for weight in weights))

    monkeypatch.setattr(currency, "_seconds", seconds)
    settings = {**SETTINGS["structured_best"], "allocation.currency": "time", "allocation.tokens": 16}
    prune(tiny_llama().to(torch.bfloat16), batches(), load_recipe("structured_best", settings))
    assert seen == {torch.bfloat16}


def test_what_is_not_pruned_is_not_touched(tmp_path: Path) -> None:
    folder = half(tmp_path)
    before = weights_of(load_model(folder).decoder())
    _, after = pruned(load_model(folder), load_recipe("sparse_best"))
    untouched = [name for name in before if "_proj" not in name]
    assert len(untouched) == 7
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in untouched)


def test_recovery_is_measured_with_what_is_written(tmp_path: Path) -> None:
    """The error on the held-out tokens, of iterates as they are rounded, does not rise."""
    folder = half(tmp_path)
    settings = {"units": "mlp", "refit.recovery": 2, "refit.held_out": 0.25, "propagation": "dense"}
    report, weights = pruned(load_model(folder), load_recipe("fasp", settings))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert report.recovered
    assert all(part.steps and part.held_out_after < part.held_out_before for part in report.recovered)


@pytest.mark.slow
def test_workers_give_the_same_bytes(tmp_path: Path) -> None:
    folder, recipe = half(tmp_path), load_recipe("sparse_best", {"propagation": "intra"})
    _, expected = pruned(load_model(folder), recipe)
    assert equal(pruned(open_model(folder), recipe, workers=Processes(2))[1], expected)


@pytest.mark.e2e
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_goes_on_gives_the_same_bytes(streamed: bool, tmp_path: Path) -> None:
    folder, recipe = half(tmp_path / "model"), load_recipe("sparse_best")
    _, expected = pruned(load_model(folder), recipe)
    for resume in (False, True):
        journal = Journal(tmp_path / "run", resume=resume)
        loaded = open_model(folder, sink=journal.sink) if streamed else load_model(folder)
        assert equal(pruned(loaded, recipe, journal=journal)[1], expected)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["its dtype"] == "torch.bfloat16"
        (tmp_path / "run" / "block-00001.json").unlink()


def test_a_layer_s_problem_is_that_of_the_run_and_the_model_stays() -> None:
    model = tiny_llama().to(torch.bfloat16)
    name, recipe = "model.layers.1.mlp.down_proj", load_recipe("sparse_best", {"propagation": "dense"})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = layer_problem(model, batches(), name, recipe)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    single = tiny_llama().to(torch.bfloat16).float()
    for own, other in zip(single.buffers(), model.buffers(), strict=True):
        own.copy_(other)
    assert found.fingerprint() == layer_problem(single, batches(), name, recipe).fingerprint()
