"""Recipes with bits: every linear layer of the blocks ends on its grid, with its zeros, in any dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.calibration import POLICIES
from optprune.errors import OptpruneError, StrictError
from optprune.grids import Grid
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama

FORMATS: dict[str, tuple[dict[str, Any], Grid]] = {
    "q4_0": ({"kind": "q4_0"}, Grid(4, 32)),
    "q8_0": ({"kind": "q8_0"}, Grid(8, 32)),
    "groups": ({"kind": "w4a16", "group": 16}, Grid(4, 16)),
    "shifted": ({"kind": "w4a16_shifted", "group": 16}, Grid(4, 16, shifted=True)),
}


def linear(model: PreTrainedModel) -> dict[str, Tensor]:
    decoder = Decoder(model)
    layers = [(index, path) for index in range(len(decoder.blocks)) for path in decoder.paths(index)]
    return {decoder.name(index, path): decoder.layer(index, path).weight.detach() for index, path in layers}


def run(model: PreTrainedModel, bits: Any, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    report = prune(model, batches(), Recipe({"units": "weights", "sparsity": 0.0, "bits": bits, **settings}))
    return report, linear(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_on_the_grid_as_stored(name: str, dtype: torch.dtype) -> None:
    bits, grid = FORMATS[name]
    _, found = run(TINY_MODELS["llama"]().to(dtype), bits)
    for layer, weight in found.items():
        assert weight.dtype == dtype
        assert grid.off(weight.float()) == 0, layer


def test_the_targets_are_the_outputs_of_the_dense_model() -> None:
    """Unless the recipe decides otherwise: without that, the errors of rounding add up over the blocks."""
    assert load_recipe("gptq").propagation is POLICIES["cross"]
    assert load_recipe("gptq", {"propagation": "pruned"}).propagation is POLICIES["pruned"]


@pytest.mark.e2e
def test_nothing_else_changes() -> None:
    before, model = tiny_llama(), tiny_llama()
    run(model, "q4_0")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {f"{name}.weight" for name in linear(before)}


def test_zeros_of_a_pattern_stay_and_the_rest_is_on_the_grid() -> None:
    report, found = run(tiny_llama(), "q4_0", **{"units": {"weights": "2:4"}, "sparsity": 0.5, "solver": "sparsegpt"})
    for layer, weight in found.items():
        assert Grid(4, 32).off(weight) == 0, layer
        assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) <= 2, layer
    assert {layer.kind for layer in report.layers} == {"grid least squares"}


def test_zeros_of_an_earlier_run_stay() -> None:
    model = tiny_llama()
    prune(model, batches(), Recipe(units="weights", sparsity=0.5, solver="wanda"))
    zeros = {name: weight == 0 for name, weight in linear(model).items()}
    _, found = run(model, "q4_0")
    for name, weight in found.items():
        assert bool((weight[zeros[name]] == 0).all()), name


@pytest.mark.e2e
def test_compensation_loses_less_than_rounding() -> None:
    lost = {}
    for solver in ("round_to_nearest", "gptq", ["gptq", "grid_descent"]):
        report, _ = run(tiny_llama(), {"kind": "q4_0", "solver": solver})
        lost[str(solver)] = sum(layer.objective for layer in report.layers)
    rounded, gptq, descent = lost.values()
    assert descent < gptq < rounded


def test_layers_whose_rows_are_not_whole_blocks_stay_as_they_are_with_a_note() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in linear(model).items()}
    report, found = run(model, "w4a16")  # of 128 weights
    assert any("12 layers with rows that are not whole blocks of 128" in note for note in report.notes)
    for name, weight in found.items():
        on_grid = Grid(4, 128).off(weight) == 0 if weight.shape[1] == 128 else False
        assert on_grid == name.endswith("down_proj")
        assert torch.equal(weight, before[name]) != on_grid
    with pytest.raises(StrictError, match="not whole blocks"):
        run(tiny_llama(), "w4a16", strict=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"units": "mlp"}, "bits need units weights"),
        ({"refit": 0.25}, "refit moves weights off the grid"),
        ({"bits": {"kind": "q4_0", "solver": "wanda"}}, "does not solve"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptpruneError, match=reason):
        run(tiny_llama(), **{"bits": "q4_0", **settings})


@pytest.mark.e2e
@pytest.mark.parametrize("name", TINY_MODELS)
def test_other_families_too(name: str) -> None:
    model = TINY_MODELS[name]()
    _, found = run(model, {"kind": "w4a16", "group": 8})
    assert found
    for layer, weight in found.items():
        assert Grid(4, 8).off(weight) == 0, layer
