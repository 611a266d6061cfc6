"""Workers that are processes: the same bytes as one, and what is left when one is killed."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.tiny_models import TINY_MODELS
from optprune import LayerContext, load_recipe
from optprune.cli import main
from optprune.errors import InputError, WorkerError
from optprune.models import Decoder
from optprune.problems import Problem
from optprune.pruning import prune
from optprune.pruning.journal import Journal
from optprune.pruning.workers import ParallelWorkers, Processes, WorkerContext, WorkerPool
from optprune.report import BlockFinished, Event
from tests.helpers.attempts import Attempt
from tests.helpers.short_runs import batches, same


def tiny() -> PreTrainedModel:
    return TINY_MODELS["llama"](num_hidden_layers=6)


class Lasting(ParallelWorkers):
    """Workers of several runs of models alike: to start processes takes longer than what they do here."""

    def __init__(self, pool: WorkerPool) -> None:
        self.given = pool

    @contextmanager
    def pool(self, context: WorkerContext) -> Iterator[WorkerPool]:
        yield self.given


@pytest.fixture(scope="module")
def two() -> Iterator[Lasting]:
    with ExitStack() as last:
        with pytest.MonkeyPatch.context() as patch:
            # Processes that begin with nothing, as users have them.
            patch.setattr("optprune.pruning.workers.multiprocessing", multiprocessing)
            pool = last.enter_context(Processes(2).pool(WorkerContext.of(Decoder(tiny()))))
        yield Lasting(pool)


@pytest.mark.parametrize("name", ["fasp", "alps", "fistapruner"])
def test_two_processes_give_the_bytes_of_one(name: str, two: Lasting) -> None:
    recipe, serial = load_recipe(name, {"propagation": "intra"}), tiny()
    shared = copy.deepcopy(serial)
    expected = prune(serial, batches(), recipe)
    report = prune(shared, batches(), recipe, workers=two)
    assert same(serial, shared)
    assert [(layer.name, layer.objective) for layer in report.layers] == [
        (layer.name, layer.objective) for layer in expected.layers
    ]


def counting(context: LayerContext) -> Problem:
    """An objective that says how many threads it is computed with."""
    raise InputError(f"{torch.get_num_threads()} threads")


@pytest.mark.e2e
def test_a_worker_has_the_threads_of_its_parent_whatever_it_began_with(
    two: Lasting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factorisation of two threads rounds otherwise than one of one."""
    recipe = load_recipe("magnitude", {"propagation": "dense"}).model_copy(update={"objective": counting})
    before = torch.get_num_threads()
    for threads in (3, 2):
        torch.set_num_threads(threads)
        try:
            monkeypatch.setattr(two.given, "_context", WorkerContext.of(Decoder(tiny())))
        finally:
            torch.set_num_threads(before)
        with pytest.raises(InputError, match=f"^{threads} threads$"):
            prune(tiny(), batches(), recipe, workers=two)


@pytest.mark.e2e
def test_a_kit_says_how_many_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert WorkerContext.of(Decoder(tiny())).threads == 7


@pytest.mark.e2e
def test_a_killed_worker_is_told_and_the_run_goes_on_from_its_journal(tmp_path: Path) -> None:
    recipe, whole = load_recipe("alps", {"propagation": "intra"}), tiny()
    prune(whole, batches(), recipe)
    before = set(multiprocessing.active_children())

    def kill(event: Event) -> None:
        workers = set(multiprocessing.active_children()) - before
        if isinstance(event, BlockFinished) and event.done == 2:
            os.kill(workers.pop().pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match="a worker process died during its task"):
        prune(tiny(), batches(), recipe, workers=Processes(2), journal=Journal(tmp_path / "run"), on_event=kill)
    assert set(multiprocessing.active_children()) <= before, "the other worker has outlived the run"
    journal, resumed = Journal(tmp_path / "run", resume=True), tiny()
    assert len(journal.finished()) >= 2
    prune(resumed, batches(), recipe, journal=journal)
    assert same(whole, resumed)


@pytest.mark.e2e
def test_a_recipe_that_cannot_travel_is_refused() -> None:
    def mine(context: LayerContext):
        return load_recipe("magnitude").state(context)

    recipe = load_recipe("magnitude", {"propagation": "dense"}).model_copy(update={"objective": mine})
    with pytest.raises(InputError, match=r"cannot be sent to another process .* top level of a module"):
        prune(tiny(), batches(), recipe, workers=Processes(2))


PARENT = """
import sys, time
from pathlib import Path
import torch
from benchmarks.tiny_models import tiny_llama
from optprune import load_recipe, prune
from optprune.pruning import Processes
from tests.pruning.test_processes import waits

if __name__ == "__main__":
    recipe = load_recipe("magnitude", {"propagation": "dense"}).model_copy(update={"objective": waits})
    prune(tiny_llama(), torch.ones(1, 8, dtype=torch.long), recipe, workers=Processes(1))
"""


def waits(context: LayerContext) -> Problem:
    """An objective that says which process it is in, and does not come to an end."""
    Path("worker").write_text(str(os.getpid()))
    time.sleep(600)
    raise AssertionError


@pytest.mark.slow
def test_a_worker_dies_with_the_process_that_started_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path)
    told = tmp_path / "worker"
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    worker = Path(f"/proc/{told.read_text()}")
    assert worker.exists()
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not worker.exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker has outlived its parent")


@pytest.mark.slow
def test_the_command_writes_the_folder_that_it_writes_without_workers(attempt: Attempt) -> None:
    folders = [attempt.folder / "one", attempt.folder / "two"]
    for folder, more in zip(folders, ((), ("--workers", "2")), strict=True):
        assert main(attempt.command(*more, output=folder, recipe="alps", propagation="intra")) == 0
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
