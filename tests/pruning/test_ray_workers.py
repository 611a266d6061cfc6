"""Workers of a Ray cluster, which repeats what a worker that died had begun."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.tiny_models import TINY_MODELS
from optprune import LayerContext, load_recipe
from optprune.errors import InputError, StrictError
from optprune.problems import Problem
from optprune.pruning import RayWorkers, prune, workers_of
from tests.helpers.short_runs import batches, same


def tiny() -> PreTrainedModel:
    return TINY_MODELS["llama"](num_hidden_layers=6)


@pytest.fixture(scope="module")
def cluster() -> RayWorkers:
    """Two workers; the tests' own warnings are no errors in what Ray starts."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONWARNINGS")
        with mock.patch.object(ray, "shutdown"):  # once for all runs
            yield RayWorkers("local", 2)
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasp", "alps", "fistapruner"])
def test_two_ray_workers_give_the_bytes_of_one_process(name: str, cluster: RayWorkers) -> None:
    recipe, serial, shared = load_recipe(name, {"propagation": "intra"}), tiny(), tiny()
    prune(serial, batches(), recipe)
    prune(shared, batches(), recipe, workers=cluster)
    assert same(serial, shared)


def killing(folder: Path):
    """An objective of alps whose worker is killed in the middle of block 2, the first time."""

    def objective(context: LayerContext) -> Problem:
        done = folder / "killed"
        if context.block == 2 and "up_proj" in context.name and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return load_recipe("alps").objective(context)

    return objective


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_is_done_by_another(tmp_path: Path, cluster: RayWorkers) -> None:
    recipe, serial, shared = load_recipe("alps", {"propagation": "intra"}), tiny(), tiny()
    prune(serial, batches(), recipe)
    report = prune(shared, batches(), recipe.model_copy(update={"objective": killing(tmp_path)}), workers=cluster)
    assert (tmp_path / "killed").exists()
    assert same(serial, shared)
    assert len(report.layers) == 6 * 7


def test_without_ray_its_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install optprune\[ray\]"):
        workers_of(load_recipe("magnitude", {"propagation": "dense"}), ray="local")


@pytest.mark.slow
def test_a_cluster_that_is_not_there_or_too_small_is_told(cluster: RayWorkers, monkeypatch) -> None:
    recipe, threads = load_recipe("magnitude", {"propagation": "dense"}), torch.get_num_threads()
    torch.set_num_threads(3)  # of two CPUs
    try:
        with pytest.raises(InputError, match="no machine of the Ray cluster at 'local' has 3 CPUs for a worker"):
            prune(tiny(), batches(), recipe, workers=cluster)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", mock.Mock(side_effect=ConnectionError("nobody answers\nat all")))
    with pytest.raises(InputError, match=r"there is no Ray cluster at 'ray.example:6379': nobody answers$"):
        prune(tiny(), batches(), recipe, workers=RayWorkers("ray.example:6379"))


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_runs(cluster: RayWorkers) -> None:
    recipe = load_recipe("fasp", {"propagation": "dense", "strict": True})
    with pytest.raises(StrictError, match="strict mode makes this an error"):
        prune(tiny(), [torch.ones(1, 8, dtype=torch.long)], recipe, workers=cluster)

    def broken(context: LayerContext) -> Problem:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        prune(tiny(), batches(), recipe.model_copy(update={"objective": broken}), workers=cluster)
