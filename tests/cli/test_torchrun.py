"""The command under torchrun: two processes write the folder that one writes with as many partial sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.run_folder import Output, keep_or_delete, run_folder_of
from optprune.errors import InputError, WorkerError
from optprune.pruning import Journal, joined
from tests.helpers.attempts import Attempt
from tests.helpers.busy_folders import held_by_another_process

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="all tokens", marks=pytest.mark.slow),
        pytest.param({"vocabulary": 400}, id="fewer tokens"),
        pytest.param({"generated": 4, "recipe": "fasp"}, id="generated windows"),
    ],
)
def test_two_processes_write_the_folder_that_one_writes(more: dict, attempt: Attempt, monkeypatch) -> None:
    one, two = attempt.folder / "one", attempt.folder / "two"
    options = {"recipe": "sparsegpt", "device": "cpu"} | more
    assert main(attempt.command("--lanes", "2", output=one, **options)) == 0
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "optprune"]
    words = [*start, *attempt.command(output=two, **options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    layers = [
        [(layer["name"], layer["objective"]) for layer in json.loads((folder / "report.json").read_text())["layers"]]
        for folder in (one, two)
    ]
    assert layers[0] == layers[1]
    assert done.stdout.count("reload check passed") == 1, "the first process alone speaks"
    once = ("planned: at most", f"saving to {two}", "the whole run")
    assert [done.stderr.count(words) for words in once] == [1, 1, 1]
    assert not run_folder_of(two).exists()


def test_a_run_that_lost_a_process_keeps_its_finished_blocks(tmp_path: Path) -> None:
    run, said = Journal(run_folder_of(tmp_path / "out")), list[str]()
    told = pytest.raises(WorkerError, match=r"gone; 1 of 2 blocks are done, and kept in .*: continue with --resume")
    with told, keep_or_delete(run, said.append):
        run.begin({"the blocks": 2})
        run.write("block-00000.json", {})
        raise WorkerError("gone")
    assert run_folder_of(tmp_path / "out").exists() and not said


def test_the_first_process_alone_looks_at_the_run_folder(tmp_path: Path, monkeypatch) -> None:
    """Each would take the lock for a moment, and be taken by another for a second run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = Output(tmp_path / "out", resume=True)
    run = Journal(run_folder_of(output.folder))
    run.begin({})
    run.release()
    with held_by_another_process(run.folder):
        monkeypatch.setenv("RANK", "1")
        output.check_run(Journal, {})
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="another process is using the run"):
            output.check_run(Journal, {})


@pytest.mark.parametrize("option", ["--workers", "--ray"])
def test_workers_of_processes_that_are_workers_are_refused(option: str, attempt: Attempt, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sentence = attempt.fails(attempt.command(option, "2"))
    assert "the processes of torchrun are already the workers: leave out --workers and --ray" in sentence


def test_a_gpu_is_not_named_where_each_process_has_its_own(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="under torchrun the device cannot be cuda:1"),
        joined("cuda:1"),
    ):
        pass


def test_more_partial_sums_than_windows_are_refused(attempt: Attempt) -> None:
    assert "9 partial sums need at least as many calibration batches, and there are" in attempt.fails(
        attempt.command("--lanes", "9")
    )
