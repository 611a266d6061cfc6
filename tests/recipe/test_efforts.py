"""The efforts of a recipe: fields that quick and best change, before the user's own settings."""

from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.choices import check_choices
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

WITH_EFFORTS = ("structured_best", "sparse_best")


@pytest.mark.parametrize("name", WITH_EFFORTS)
def test_standard_is_the_recipe_as_it_is(name: str) -> None:
    assert load_recipe(name, effort="standard") == load_recipe(name)


@pytest.mark.parametrize("name", WITH_EFFORTS)
def test_quick_leaves_out_what_takes_time(name: str) -> None:
    quick = load_recipe(name, effort="quick")
    assert quick.metric is None and quick.allocation.kind == "uniform"
    assert "(changed here: " in quick.summary


@pytest.mark.parametrize("name", WITH_EFFORTS)
def test_best_recovers_what_standard_leaves(name: str) -> None:
    standard, best = load_recipe(name), load_recipe(name, effort="best")
    assert best.refit is not None and best.refit.recovery is not None
    assert standard.refit is None or standard.refit.recovery is None
    assert best.metric == standard.metric


def test_best_keeps_the_dampings_of_structured_best() -> None:
    standard, best = load_recipe("structured_best").refit, load_recipe("structured_best", effort="best").refit
    assert standard is not None and best is not None
    assert best.dampings == standard.dampings and best.held_out == standard.held_out


def test_own_settings_come_after_those_of_the_effort() -> None:
    assert load_recipe("structured_best", {"units": "all"}, effort="best").units.name == "all"
    assert load_recipe("sparse_best", {"metric": "diagonal"}, effort="quick").metric is not None


@pytest.mark.parametrize("name", WITH_EFFORTS)
@pytest.mark.parametrize("effort", ["quick", "best"])
def test_every_effort_reaches_the_sparsity(name: str, effort: str) -> None:
    model = tiny_llama()
    report = prune(model, batches(), load_recipe(name, {"sparsity": 0.3}, effort=effort))
    assert abs(report.sparsity_reached - 0.3) < 0.05
    assert bool(report.recovered) == (effort == "best")
    if name == "sparse_best":
        decoder = Decoder(model)
        zeros = sum(
            int((decoder.layer(block, path).weight == 0).sum())
            for block in range(len(decoder.blocks))
            for path in decoder.paths(block)
        )
        assert zeros == pytest.approx(0.3 * decoder.linear_weights(), rel=0.01)


def test_a_recipe_without_efforts_refuses_them() -> None:
    assert load_recipe("fasp", effort="standard").name == "fasp"
    with pytest.raises(InputError, match="the recipe fasp has no effort quick: leave the effort out"):
        load_recipe("fasp", effort="quick")


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(InputError, match="the effort 'fast' is not known: use quick, standard or best"):
        load_recipe("fasp", effort="fast")


@pytest.mark.parametrize("name", ["mine.yaml", "MINE.YML"])
def test_a_file_has_efforts_of_its_own(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    check_choices(str(file))
    file.write_text("solver: wanda\nunits: weights\nsparsity: 0.5\nefforts: {quick: {sparsity: 0.25}}\n")
    assert load_recipe(str(file)).sparsity == 0.5
    assert load_recipe(str(file), effort="quick").sparsity == 0.25
    with pytest.raises(InputError, match="has no effort best"):
        load_recipe(str(file), effort="best")


@pytest.mark.parametrize("efforts", ["fast", "[quick]", "{fast: {sparsity: 0.1}}", "{quick: uniform}"])
def test_efforts_that_are_not_fields_are_refused(efforts: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"solver: wanda\nunits: weights\nefforts: {efforts}\n")
    with pytest.raises(InputError, match="are not fields of quick or best"):
        load_recipe(str(file))


def test_the_command_refuses_before_it_reads_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["no-such-model", "--calibration", "demo:calibration", "--output", str(tmp_path / "out")]
    assert main(["prune", *arguments, "--effort", "fast"]) != 0
    assert "--effort cannot be 'fast'" in capsys.readouterr().err
    assert main(["prune", *arguments, "--effort", "quick"]) != 0
    assert "the recipe fasp has no effort quick" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_EFFORTS)
def test_a_printed_recipe_has_its_efforts(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", name]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    for effort in ("quick", "standard", "best"):
        same = {"summary": load_recipe(name).summary}
        assert load_recipe(str(file), same, effort=effort) == load_recipe(name, same, effort=effort)
