"""An allocation file: the recipe.yaml beside the weights holds it, and makes the folder again, byte for byte."""

import json
from pathlib import Path

import pytest
import yaml

from optprune import Allocation, load_recipe
from optprune.cli import main
from optprune.models import BlockAllocation, BlockShape
from optprune.recipe import Recipe
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama

TEXT = "The report was published on Monday, and officials said that it would be read with care. " * 60
WIDTHS = (40, 104)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def attempt(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Attempt:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return Attempt(dense, text, tmp_path, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An allocation of other widths in each block, with a sparsity that is not theirs: it is not believed."""
    shapes = [BlockShape(width, 2, 16) for width in WIDTHS]
    found = tmp_path / "allocation.json"
    found.write_text(Allocation(tuple(map(BlockAllocation, shapes)), 0.77).to_json())
    return found


def test_the_recipe_beside_the_weights_makes_the_folder_again(attempt: Attempt, file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    small = ("--samples", "4", "--seq-length", "32")
    common = ["prune", str(attempt.model), "--calibration", str(attempt.text), *small]
    assert main([*common, "--allocation", str(file), "--output", str(first)]) == 0
    assert main([*common, "--recipe", str(first / "recipe.yaml"), "--output", str(second)]) == 0
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for report in reports:
        recipe = report["recipe"]
        assert recipe["allocation"]["kind"] == "given"
        assert [block["mlp_width"] for block in recipe["allocation"]["blocks"]] == list(WIDTHS)
        assert recipe["sparsity"] == report["sparsity_reached"] == report["sparsity_requested"] != 0.2
        assert report["allocation"]["blocks"] == recipe["allocation"]["blocks"]
    assert yaml.safe_load((first / "recipe.yaml").read_text()) == reports[0]["recipe"]
    assert load_recipe(str(first / "recipe.yaml")) == Recipe(reports[0]["recipe"])


def test_a_sparsity_beside_blocks_that_are_given_is_refused(attempt: Attempt, file: Path, tmp_path: Path) -> None:
    recipe, allocation = tmp_path / "recipe.yaml", json.loads(file.read_text())
    fields = {"name": "mine", "allocation": {"kind": "given", "blocks": allocation["blocks"]}, "sparsity": 0.3}
    recipe.write_text(yaml.safe_dump(fields))
    common = ["prune", str(attempt.model), "--calibration", str(attempt.text), "--output", str(tmp_path / "out")]
    told = attempt.fails([*common, "--recipe", str(recipe), "--sparsity", "0.4"])
    assert "'sparsity' cannot be 0.4: the recipe lists what every block keeps: set allocation too" in told
    told = attempt.fails([*common, "--allocation", str(file), "--width-multiple", "16"])
    assert "'allocation.multiple' has no effect without allocation.kind uniform or global" in told
    assert load_recipe(str(recipe), {"sparsity": 0.4, "allocation": "uniform"}).given is None


@pytest.mark.parametrize("blocks", [3, [{}], [{"mlp_width": "x"}], [{"mlp_width": 4, "kv_heads": 2}], [None]])
def test_blocks_that_are_none_are_refused(blocks: object) -> None:
    with pytest.raises(ValueError, match=r"^the recipe"):
        Recipe({"allocation": {"kind": "given", "blocks": blocks}})
