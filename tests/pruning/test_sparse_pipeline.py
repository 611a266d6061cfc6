"""Sparse recipes through the whole pipeline: exact counts, every policy, and what `audit` measures afterwards."""

import json
from pathlib import Path

import pytest
import torch

from optprune.calibration import POLICIES
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.report import layer_pattern, model_patterns
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_tokenizer
from tests.helpers.token_batches import batches

RECIPES = ["magnitude", "wanda", "sparsegpt", "alps", "alps_plus", "fistapruner", "fistapruner_plus"]
PATTERNS = {"unstructured": 0.4, "rows": 0.4, "2:4": 0.5, "4:8": 0.5}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_has_the_count_asked_for(recipe: str, pattern: str) -> None:
    model = tiny_llama()
    sparsity = PATTERNS[pattern]
    report = prune(model, batches(), load_recipe(recipe, {"units.weights": pattern, "sparsity": sparsity}))
    assert len(report.layers) == 14
    for layer in model_patterns(Decoder(model)):
        weights = layer.outputs * layer.inputs
        if pattern == "unstructured":
            assert layer.zeros == weights - round((1 - sparsity) * weights)
        else:
            assert layer.same_in_rows
            assert layer.zeros == layer.outputs * (layer.inputs - round((1 - sparsity) * layer.inputs))
        if ":" in pattern:
            assert pattern in layer.patterns


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_under_every_policy(recipe: str, policy: str) -> None:
    report = prune(tiny_llama(), batches()[:2], load_recipe(recipe, {"propagation": policy}))
    assert report.sparsity_reached == pytest.approx(0.5, abs=1e-6)
    assert all(0 <= layer.relative_error < 1 for layer in report.layers)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture(name: str) -> None:
    model = TINY_MODELS[name]()
    prune(model, batches(), load_recipe("alps", {"units.weights": "2:4"}))
    assert all("2:4" in layer.patterns for layer in model_patterns(Decoder(model)))


@pytest.mark.e2e
def test_better_solvers_leave_smaller_errors() -> None:
    """On the same moments: the first layers of the first block, whose inputs are those of the dense model."""

    def error(recipe: str) -> float:
        options = {"units.weights": "rows", "propagation": "dense"}
        report = prune(tiny_llama(), batches(), load_recipe(recipe, options))
        return sum(layer.relative_error for layer in report.layers) / len(report.layers)

    errors = {recipe: error(recipe) for recipe in RECIPES}
    assert errors["alps_plus"] <= errors["alps"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    assert errors["fistapruner"] < errors["sparsegpt"]
    assert errors["fistapruner_plus"] < errors["sparsegpt"]


@pytest.mark.e2e
def test_audit_measures_a_folder_that_prune_wrote(tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "dense", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text("The committee met on Monday and talked about prices. " * 400)
    text, output = str(tmp_path / "text.txt"), str(tmp_path / "out")
    options = ["--pattern", "2:4", "--samples", "4", "--seq-length", "64", "--calibration", text, "--output", output]
    code = main(["prune", str(tmp_path / "dense"), "--recipe", "wanda", *options])
    assert code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["units"] == {"weights": "2:4"}
    assert main(["audit", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sparsity"] == 0.5
    assert "2:4" in found["patterns"]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert main(["audit", str(tmp_path / "out"), "--plot", str(tmp_path / f"kept.{kind}")]) == 0
        assert (tmp_path / f"kept.{kind}").read_bytes().startswith(start)


def test_audit_tells_patterns_apart() -> None:
    weight = torch.ones(4, 8)
    assert layer_pattern("dense", weight).patterns == ()
    weight[:, ::2] = 0
    half = layer_pattern("half", weight)
    assert half.patterns == ("2:4", "4:8") and half.same_in_rows and half.zero_inputs == 4
    weight[0] = 1
    weight[0, :4] = 0
    assert layer_pattern("4:8 only", weight).patterns == ("4:8",)
    weight[0, 4] = 0
    assert not layer_pattern("uneven", weight).same_in_rows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"units.weights": "2:4", "sparsity": 0.4},
            "the pattern 2:4 has a sparsity of 0.5, not 0.4: set sparsity to 0.5",
        ),
        ({"units.weights": "4:4"}, "keeps everything"),
        ({"units.weights": "diagonal"}, "cannot be 'diagonal'"),
        ({"units": "mlp"}, "units must be weights"),
    ],
)
def test_contradictory_recipes_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("wanda", overrides)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("7:8", 0.125)])
def test_an_n_of_m_pattern_sets_the_sparsity_that_nobody_gave(pattern: str, sparsity: float) -> None:
    assert Recipe(units={"weights": pattern}).sparsity == sparsity  # type: ignore[arg-type]
    assert Recipe(Recipe(units={"weights": pattern}).to_dict()).sparsity == sparsity  # type: ignore[arg-type]
    assert Recipe({"units.weights": pattern, "units": "weights", "sparsity": 0}).sparsity == 0
    for other in (0.2, 0.4):
        with pytest.raises(InputError, match=f"the pattern {pattern} has a sparsity of {sparsity:g}, not {other}: set"):
            Recipe(units={"weights": pattern}, sparsity=other)  # type: ignore[arg-type]


def test_an_n_of_m_pattern_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="needs a multiple of 7 inputs, not 64"):
        prune(tiny_llama(), batches(), load_recipe("wanda", {"units.weights": "3:7", "sparsity": 4 / 7}))
