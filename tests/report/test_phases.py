"""Phases in the report of a run: their seconds and memory."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optprune.allocation import Allocation
from optprune.cli import main
from optprune.errors import OptpruneError
from optprune.export import SavedModel, check, save_model
from optprune.export.place import UNCHECKED
from optprune.models import load_model
from optprune.pruning import Journal, prune
from optprune.recipe import load_recipe
from optprune.report import PHASES, Event, PhaseFinished, PhaseRecorder, PhaseReport, PhaseStarted, joined
from tests.helpers.memory import MIB, told
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.token_batches import batches

CPU = torch.device("cpu")


def test_phases_are_joined_in_the_order_in_which_they_came_first() -> None:
    first = [PhaseReport("loading", 1.0, 10, None), PhaseReport("metric", 2.0, 30, 5)]
    second = [
        PhaseReport("loading", 4.0, 40, None),
        PhaseReport("metric", 1.0, None, 7),
        PhaseReport("budget", 0.5, 1, 1),
    ]
    assert joined(first, second) == (
        PhaseReport("loading", 5.0, 40, None),
        PhaseReport("metric", 3.0, 30, 7),
        PhaseReport("budget", 0.5, 1, 1),
    )


@told
def test_a_recorder_has_what_each_phase_took() -> None:
    events: list[Event] = []
    recorder = PhaseRecorder(CPU, events.append)
    with recorder.phase("metric"):
        held = torch.ones(100 * MIB // 4)
        time.sleep(0.15)
        del held
    with recorder.phase("budget"):
        pass
    with recorder.phase("metric"):
        time.sleep(0.1)
    metric, budget = recorder.done
    assert (metric.name, budget.name) == ("metric", "budget")
    assert 0.25 <= metric.seconds < 5 and budget.seconds < 0.1
    assert metric.host_bytes is not None and budget.host_bytes is not None
    assert metric.host_bytes > budget.host_bytes + 80 * MIB
    assert [type(event) for event in events] == [PhaseStarted, PhaseFinished] * 3


def test_a_phase_that_fails_is_not_over() -> None:
    events: list[Event] = []
    recorder = PhaseRecorder(CPU, events.append)
    with pytest.raises(ZeroDivisionError), recorder.phase("metric"):
        raise ZeroDivisionError
    assert recorder.done == () and events == [PhaseStarted("metric")]


@told
def test_prune_reports_its_phases(tmp_path: Path) -> None:
    model = tiny_llama()
    report = prune(model, batches(), load_recipe("sparse_best"))
    assert [phase.name for phase in report.phases] == ["metric", "budget", "pruning"]
    assert 0.9 * report.seconds < sum(phase.seconds for phase in report.phases) <= report.seconds
    weights = sum(weight.nbytes for weight in model.parameters())
    assert all(phase.host_bytes is not None and phase.host_bytes > weights for phase in report.phases)
    assert all(phase.device_bytes is None for phase in report.phases)
    # With a journal all weights are read once before, which is loading.
    report = prune(tiny_llama(), batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run"))
    assert [phase.name for phase in report.phases] == ["loading", "metric", "budget", "pruning"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.e2e
@told
@pytest.mark.usefixtures("real_reload_check")  # which takes the time that it takes users
def test_the_folder_of_a_command_reports_all_seven(folder: Path, attempted_text: Path, tmp_path: Path, capsys) -> None:
    output, results = tmp_path / "out", tmp_path / "results.json"
    words = ["prune", str(folder), "--calibration", str(attempted_text), "--output", str(output), "--samples", "8"]
    words += ["--seq-length", "32", "--recipe", "structured_best", "--save-dtype", "bfloat16", "--json", str(results)]
    began = time.perf_counter()
    assert main(words) == 0, capsys.readouterr().err
    seconds = time.perf_counter() - began
    report = json.loads((output / "report.json").read_text())
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert sorted(phases) == sorted(PHASES) and len(report["phases"]) == len(PHASES)
    assert 0.8 * seconds < sum(phase["seconds"] for phase in phases.values()) <= seconds
    block = sum(weight.nbytes for weight in load_model(folder).decoder().blocks[0].parameters())
    for phase in phases.values():
        assert phase["seconds"] > 0 and phase["host_bytes"] > block and phase["device_bytes"] is None
    assert json.loads(results.read_text()) == {"generator": "written by optprune", **report}


def test_a_report_without_phases_is_still_read() -> None:
    """As runs of earlier versions wrote them: as a file of allocations."""
    report = json.loads(prune(tiny_llama(), batches(), load_recipe("fasp", {"sparsity": 0.3})).to_json())
    del report["phases"]
    assert Allocation.from_json(json.dumps(report)).to_dict() == report["allocation"]


def test_a_folder_that_was_not_checked_says_nothing_of_checking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, recipe = load_model(save_tiny(tiny_llama(), tmp_path / "model")), load_recipe("fasp")
    report = prune(loaded.model, batches(), recipe)

    def save(difference: float, on_event: Callable[[Event], None] = lambda event: None) -> SavedModel:
        told = subprocess.CompletedProcess([], 0, json.dumps({"difference": difference}), "")
        monkeypatch.setattr(check, "run_alongside", lambda *_: told)
        window = batches()[0][0]
        return save_model(
            loaded, tmp_path / "out", report=report, recipe=recipe, check_tokens=window[None], on_event=on_event
        )

    with pytest.raises(OptpruneError, match="logits differ by"):
        save(1e9)
    unchecked = json.loads((tmp_path / f"out{UNCHECKED}" / "report.json").read_text())
    assert [phase["name"] for phase in unchecked["phases"]] == ["metric", "budget", "pruning", "saving"]
    events: list[Event] = []
    saved = save(0.0, events.append)
    assert saved.report is not None
    assert [phase.name for phase in saved.report.phases] == ["metric", "budget", "pruning", "saving", "checking"]
    assert (tmp_path / "out" / "report.json").read_text() == saved.report.to_json()
    over = [event.phase for event in events if isinstance(event, PhaseFinished)]
    assert joined(report.phases, over) == saved.report.phases
