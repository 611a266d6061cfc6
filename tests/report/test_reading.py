"""Reading of report.json: reports of this and earlier versions, and refused files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from optprune.errors import InputError
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import GoalReached, RecoveredPart, RemovedPart, page, read_evaluation, read_report, read_speed
from tests.helpers.reports import evaluated, layer, narrowed, speed
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches


def test_what_a_run_wrote_is_read_back(tmp_path: Path) -> None:
    report = prune(tiny_llama(), batches(), load_recipe("fasp", {"sparsity": 0.3}))
    (tmp_path / "report.json").write_text(report.to_json())
    assert read_report(tmp_path).to_json() == report.to_json()
    part = RecoveredPart("model.layers.0.mlp", ("mlp.down_proj",), 0.5, 0.25, 0.75, 0.375, 12, 3.0)
    made = narrowed(recovered=(part,), removed=(RemovedPart(2, "mlp", 5, 0.5),))
    (tmp_path / "report.json").write_text(made.to_json())
    assert read_report(tmp_path) == made


def test_numbers_that_json_does_not_know_come_back_as_nan(tmp_path: Path) -> None:
    bad = layer(0, "mlp.down_proj", relative_error=math.nan, objective=math.inf)
    (tmp_path / "report.json").write_text(narrowed(layers=(bad,), floor_seconds=math.nan).to_json())
    report = read_report(tmp_path)
    assert math.isnan(report.layers[0].relative_error) and math.isnan(report.layers[0].objective)
    assert math.isnan(report.floor_seconds)
    finite = {"relative_error": 0.0, "objective": 0.0}  # NaN equals nothing from Python 3.13 on
    assert replace(report.layers[0], **finite) == replace(bad, **finite)


def test_a_report_of_the_first_version_is_read(tmp_path: Path) -> None:
    data = json.loads(narrowed().to_json())
    for name in ("notes", "calibration", "allocation", "removed", "recovered", "blocks", "phases"):
        del data[name]
    for each in data["layers"]:
        del each["stages"], each["held_out_error"]
    (tmp_path / "report.json").write_text(json.dumps({**data, "of_a_later_version": 1}))
    report = read_report(tmp_path)
    assert (report.blocks, report.phases, report.layers[1].held_out_error) == ((), (), None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "has no report.json: give a folder that optprune prune wrote"),
        ("{", "is not valid JSON"),
        ("[]", "is not the report of a run"),
        ("{}", r"is not the report of a run \(model: "),
        (json.dumps({**json.loads(narrowed().to_json()), "layers": [1]}), r"is not the report of a run \(layers.0: "),
        (json.dumps({**json.loads(narrowed().to_json()), "seconds": "long"}), r"not the report of a run \(seconds: "),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(text: str | None, reason: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_measurements_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(evaluated(perplexity=None)))
    found = read_evaluation(file)
    assert (found.perplexity, found.divergence, len(found.along), len(found.generations)) == (None, 0.5432, 8, 10)
    with pytest.raises(InputError, match="is not what optprune benchmark-model --json writes"):
        read_speed(file)
    file.write_text(json.dumps(speed()))
    assert read_speed(file).models[0].decode.median == 30.0
    with pytest.raises(InputError, match="is not what optprune evaluate --json writes"):
        read_evaluation(file)
    file.write_text(json.dumps({**speed(), "models": []}))
    with pytest.raises(InputError, match="has 0 models"):
        read_speed(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")


def test_what_was_asked_is_said() -> None:
    report = narrowed()
    assert "0.00%" not in repr(replace(report, sparsity_requested=0.0))
    assert "no sparsity requested" in page(replace(report, sparsity_requested=0.0))
    goal = GoalReached("95MiB", "of weights", 0.2479, 95 * 2**20)
    asked = replace(report, goal=goal, sparsity_requested=0.2479)
    assert "95MiB requested" in repr(asked) and "95MiB requested" in page(asked)
    assert "24.79% requested" not in page(asked)
