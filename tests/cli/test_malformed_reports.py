"""Folders whose report, recipe or evaluation is malformed: a sentence each, and no sequence that a terminal obeys."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from optprune import prune, save_model
from optprune.cli import main
from optprune.models import LoadedModel
from optprune.recipe import load_recipe
from tests.helpers.reports import evaluated
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.token_batches import batches

RED = "\x1b[31mred $\\frac$\x1b[0m"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, recipe = tiny_llama(), load_recipe("wanda", {"sparsity": 0.5})
    report = prune(model, batches(), recipe)
    place = tmp_path_factory.mktemp("pruned") / "model"
    return save_model(
        LoadedModel(model, None, ""), place, report=report, recipe=recipe, check_tokens=batches()[0][:1]
    ).folder


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "model"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit status of a command and all that it printed."""
    capsys.readouterr()
    code = main(list(words))
    captured = capsys.readouterr()
    assert "unexpected" not in captured.err
    return code, captured.out + captured.err


def test_a_report_that_is_null_is_told(folder: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.json").write_text("null")
    code, told = said(capsys, "report", str(folder))
    assert code == 2 and f"{folder / 'report.json'} is not the report of a run" in told
    code, told = said(capsys, "audit", str(folder))
    assert code == 0 and "note: report.json is not a report, so it is ignored" in told
    code, told = said(capsys, "plan", str(dense), "--no-probe", "--allocation", str(folder / "report.json"))
    assert code == 2 and "cannot be used: this is not an allocation" in told and "it is None" in told


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({}, "the block {} lacks mlp_width"),
        ({"mlp_width": 4, "kv_heads": 2, "value_dim": 16, "": 1}, "a block has no field ''"),
        ({"mlp_width": 4.5, "kv_heads": 2, "value_dim": 16}, "must be whole numbers"),
    ],
    ids=str,
)
def test_a_block_that_is_none_is_told_in_our_words(
    block: Any, reason: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps({"sparsity": 0.5, "blocks": [block]}))
    code, told = said(capsys, "plan", str(dense), "--no-probe", "--allocation", str(file))
    assert code == 2 and reason in told


@pytest.mark.parametrize("number", [1e308, 1e299, -1e308])
@pytest.mark.parametrize("field", ["divergence", "agreement", "perplexity"])
def test_numbers_that_no_axis_ends_at_are_not_drawn(
    field: str, number: float, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    found = evaluated(weights=hashlib.sha256(inner).hexdigest())
    for stretch in found["along"]:
        stretch[field] = number
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found))
    assert said(capsys, "report", str(folder), "--evaluation", str(file))[0] == 0


def test_numbers_that_are_no_count_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["blocks"][0]["before"]["mlp_width"] = 10**400
    (folder / "report.json").write_text(json.dumps(report))
    code, told = said(capsys, "report", str(folder))
    assert code == 2 and "which is beyond 64 bits" in told


def strings(data: Any) -> Any:
    """The same data with a sequence that a terminal obeys behind every text that no file's format fixes."""
    if isinstance(data, dict):
        return {key: strings(value) for key, value in data.items()}
    if isinstance(data, list):
        return [strings(value) for value in data]
    return data + RED if isinstance(data, str) else data


def test_no_text_of_a_report_reaches_the_terminal_as_it_is(
    folder: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(strings(report) | {"recipe": report["recipe"]}))
    (tmp_path / "found.json").write_text(json.dumps(strings(evaluated())))
    evaluation = ("--evaluation", str(tmp_path / "found.json"))
    commands = (
        ("report", str(folder), *evaluation),
        ("audit", str(folder)),
        ("audit", str(folder), "--against", str(dense), "--expect", "2:4"),
        ("inspect", str(folder)),
        ("plan", str(dense), "--no-probe", "--allocation", str(folder / "report.json")),
        ("plan", str(dense), "--no-probe", "--recipe", f"{RED}.yaml"),
        ("evaluate", str(folder), "--text", f"{RED}.txt"),
    )
    for words in commands:
        assert "\x1b" not in said(capsys, *words)[1], words


def test_no_name_of_a_tensor_reaches_the_terminal_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{RED}.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, told = said(capsys, "audit", str(folder))
    assert code == 1 and "red" in told and "\x1b" not in told


def test_an_expectation_that_no_layer_meets_is_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = said(capsys, "audit", str(folder), "--expect", "2:4", "--expect", "1:4")
    faults = [line for line in told.splitlines() if line.startswith("fault: ")]
    assert code == 1
    assert [line.split()[1] for line in faults] == ["2:4:", "1:4:"]
    assert all(line.endswith(", and 13 more such faults (listed by --json)") for line in faults), faults
