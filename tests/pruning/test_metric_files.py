"""Output metrics in the run folder: a run that goes on reads them, and does not measure them again."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from optprune import load_recipe
from optprune.calibration import Statistics, dense_statistics
from optprune.models import open_model
from optprune.pruning import Journal, prune
from optprune.report import BlockStarted, Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from tests.helpers.short_runs import batches, same
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.weights import weights_of

RUNS = {
    "sparse_best": ("sparse_best", {"metric.width": 100}),
    "structured_best": (
        "structured_best",
        {"allocation.probe_tokens": 32, "allocation.multiple": 8, "refit.held_out": 0.25},
    ),
}
BLOCKS = 3


class Stopped(Exception):
    """In place of a kill."""


def between_blocks(event: Event) -> None:
    if isinstance(event, BlockStarted) and event.block == 1:
        raise Stopped


def before_the_division(event: Event) -> None:
    if isinstance(event, PhaseAdvanced) and event.phase == BUDGET and event.done:
        raise Stopped


def tiny() -> Any:
    return tiny_llama(num_hidden_layers=BLOCKS)


def begun(folder: Path, run: str = "sparse_best", stop: Callable[[Event], None] = between_blocks) -> None:
    recipe, settings = RUNS[run]
    with pytest.raises(Stopped):
        prune(tiny(), batches(), load_recipe(recipe, settings), journal=Journal(folder), on_event=stop)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after its first block; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    begun(folder)
    return folder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each Fisher pass."""
    made, collect = list[int](), dense_statistics.collect_metrics
    monkeypatch.setattr(
        dense_statistics, "collect_metrics", lambda *args, **how: made.append(1) or collect(*args, **how)
    )
    return made


@pytest.mark.e2e
@pytest.mark.parametrize("stop", [between_blocks, before_the_division])
@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_measures_no_metric(
    run: str, stop: Callable[[Event], None], tmp_path: Path, passes: list[int]
) -> None:
    whole, resumed, (recipe, settings) = tiny(), tiny(), RUNS[run]
    expected = prune(whole, batches(), load_recipe(recipe, settings))
    begun(tmp_path / "run", run, stop)
    assert len(passes) == 2
    left = sorted(file.name for file in (tmp_path / "run").glob("metric-*"))
    assert left == [f"metric-{block:05d}.sums" for block in range(stop is between_blocks, BLOCKS)]
    journal = Journal(tmp_path / "run", resume=True)
    report = prune(resumed, batches(), load_recipe(recipe, settings), journal=journal)
    assert len(passes) == 2
    assert same(whole, resumed)
    assert report.notes == expected.notes
    assert not list((tmp_path / "run").glob("metric-*"))


@pytest.mark.e2e
def test_a_resumed_run_of_a_model_read_block_by_block_measures_no_metric(tmp_path: Path, passes: list[int]) -> None:
    whole, recipe = tiny(), load_recipe(*RUNS["sparse_best"])
    whole.save_pretrained(tmp_path / "model")
    prune(whole, batches(), recipe)
    for resume, stop in ((False, pytest.raises(Stopped)), (True, nullcontext())):
        journal = Journal(tmp_path / "run", resume=resume)
        opened = open_model(tmp_path / "model", sink=journal.sink)
        heed = (lambda event: None) if resume else between_blocks
        with stop:
            prune(opened.model, batches(), recipe, store=opened.store, journal=journal, on_event=heed)
    assert len(passes) == 2
    found = weights_of(opened.decoder())
    assert all(torch.equal(found[name], weight) for name, weight in whole.state_dict().items() if name in found)
    assert len(found) > 7 * BLOCKS


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metric-00001.sums", flipped),
        ("metric-00002.sums", lambda file: file.write_bytes(file.read_bytes()[:100])),
        ("metric-00001.sums", lambda file: file.write_bytes(file.with_name("metric-00002.sums").read_bytes())),
        ("metrics.json", lambda file: file.write_bytes(file.read_bytes()[:40])),
        ("metrics.json", lambda file: file.write_text('{"layers": {}}')),
        ("metrics.json", lambda file: file.write_text('{"layers": {"a": {"block": 1}}, "files": {"1": "", "2": ""}}')),
    ],
)
def test_a_file_that_is_not_the_one_written_is_measured_again(
    name: str, damage: Callable[[Path], None], a_run: Path, tmp_path: Path, passes: list[int]
) -> None:
    shutil.copytree(a_run, tmp_path / "run")
    damage(tmp_path / "run" / name)
    resumed, whole, recipe = tiny(), tiny(), load_recipe(*RUNS["sparse_best"])
    report = prune(resumed, batches(), recipe, journal=Journal(tmp_path / "run", resume=True))
    assert len(passes) == 1
    assert any(note.startswith(f"{name} in the run folder was damaged") for note in report.notes)
    prune(whole, batches(), recipe)
    assert same(whole, resumed)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["metric-00001.sums", "metrics.json"])
def test_what_is_not_there_any_more_is_measured_again(
    name: str, a_run: Path, tmp_path: Path, passes: list[int]
) -> None:
    shutil.copytree(a_run, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    resumed, whole, recipe = tiny(), tiny(), load_recipe(*RUNS["sparse_best"])
    prune(resumed, batches(), recipe, journal=Journal(tmp_path / "run", resume=True))
    assert len(passes) == 1
    prune(whole, batches(), recipe)
    assert same(whole, resumed)


@pytest.mark.e2e
def test_statistics_that_runs_share_outlive_the_folder_of_one(tmp_path: Path, passes: list[int]) -> None:
    statistics, recipe = Statistics(), load_recipe(*RUNS["sparse_best"])
    first, second = tiny(), tiny()
    journal = Journal(tmp_path / "run")
    prune(first, batches(), recipe, statistics=statistics, journal=journal)
    journal.discard()
    prune(second, batches(), recipe, statistics=statistics)
    assert same(first, second)
    assert len(passes) == 1
