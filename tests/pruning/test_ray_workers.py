"""Workers of a Ray cluster, which repeats what a worker that died had begun."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from ipaddress import ip_address
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.tiny_models import TINY_MODELS
from optprune import LayerContext, load_recipe
from optprune.errors import InputError, StrictError, WorkerError
from optprune.problems import Problem
from optprune.pruning import RayWorkers, prune, ray_workers, workers_of
from optprune.pruning.ray_workers import check_listening, for_this_machine
from tests.helpers.short_runs import batches, same


def tiny() -> PreTrainedModel:
    return TINY_MODELS["llama"](num_hidden_layers=6)


@pytest.fixture(scope="module")
def cluster() -> RayWorkers:
    """Two workers, on a cluster for all runs; the tests' own warnings are no errors in what Ray starts."""
    import ray

    with pytest.MonkeyPatch.context() as patch, for_this_machine():
        patch.delenv("PYTHONWARNINGS")
        ray.init("local", log_to_driver=False, include_dashboard=False, num_cpus=2)
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
def test_a_local_cluster_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose home is empty: where all processes of the run listen, and what asks who calls."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True, cwd=tmp_path)
    told = json.loads(run.stdout.splitlines()[-1])
    assert len(told["addresses"]) >= 4  # the driver, the GCS, the raylet and a worker at least
    assert [each for each in told["addresses"] if not ip_address(each.removeprefix("::ffff:")).is_loopback] == []
    assert told["modes"] == ["token"] and told["tokens"] == 1
    assert told["stranger"] == "refused" and told["left"] == {}
    assert not list(home.rglob("auth_token"))


LISTENING = """
import json, os, subprocess, sys
from collections import Counter
from contextlib import suppress
import psutil
from optprune.models import Decoder
from optprune.pruning import RayWorkers
from optprune.pruning.workers import WorkerContext
from benchmarks.tiny_models import tiny_llama

STRANGER = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('let in')"

if __name__ == "__main__":
    with RayWorkers("local", 1).pool(WorkerContext.of(Decoder(tiny_llama()))) as pool:
        import ray
        ray.get(ray.remote(lambda: None).remote())
        here = psutil.Process()
        addresses, environments = [], []
        for process in (here, *here.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                addresses += [each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"]
                if process != here and process.name() in ("gcs_server", "raylet"):
                    environments.append(process.environ())
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        clean["RAY_AUTH_MODE"] = "disabled"
        words = [sys.executable, "-c", STRANGER, ray.get_runtime_context().gcs_address]
        try:
            answer = subprocess.run(words, env=clean, capture_output=True, text=True, timeout=40).stdout
        except subprocess.TimeoutExpired:
            answer = ""
        said = {
            "addresses": addresses,
            "modes": sorted({each.get("RAY_AUTH_MODE") for each in environments}),
            "tokens": len({each.get("RAY_AUTH_TOKEN") for each in environments}),
            "stranger": "let in" if "let in" in answer else "refused",
        }
    left = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    print(json.dumps({**said, "left": left}))
"""


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
    with pytest.raises(InputError, match=r"pip install -e '\.\[ray\]' in optprune's checkout"):
        workers_of(load_recipe("magnitude", {"propagation": "dense"}).propagation, ray="local")


@pytest.mark.slow
def test_a_cluster_that_is_not_there_or_too_small_is_told(cluster: RayWorkers, monkeypatch) -> None:
    recipe, threads = load_recipe("magnitude", {"propagation": "dense"}), torch.get_num_threads()
    torch.set_num_threads(3)  # of two CPUs
    try:
        message = "a worker needs 3 CPUs and no machine of the Ray cluster at 'local' has them"
        with pytest.raises(InputError, match=message):
            prune(tiny(), batches(), recipe, workers=cluster)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", mock.Mock(side_effect=ConnectionError("nobody answers\nat all")))
    with pytest.raises(InputError, match=r"there is no Ray cluster at 'auto': nobody answers; start one there"):
        prune(tiny(), batches(), recipe, workers=RayWorkers("auto"))


@pytest.mark.parametrize("address", [":", "127.0.0.1:", ":6379", "ray://host:x"])
def test_an_address_without_a_host_or_a_port_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=f"the Ray address '{address}' is no host and port: write it as"):
        check_listening(address)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    policy, began = load_recipe("magnitude", {"propagation": "dense"}).propagation, time.monotonic()
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}"):
        with pytest.raises(InputError, match=f"nobody listens at the Ray address '{address}'"):
            workers_of(policy, ray=address)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("local", WorkerError, "Ray did not start on this machine: {}; free memory or processors"),
        ("auto", InputError, "there is no Ray cluster at 'auto': {}; start one there"),
    ],
)
def test_ray_that_fails_or_never_answers_is_told_in_a_sentence(
    address: str, kind: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    ray = mock.Mock()
    ray.is_initialized.return_value = False
    monkeypatch.setattr(ray_workers, "_ray", lambda: ray)
    monkeypatch.setattr(ray_workers, "for_this_machine", nullcontext)
    monkeypatch.setattr(ray_workers, "STARTING", 0.1)
    recipe = load_recipe("magnitude", {"propagation": "dense"})
    try:
        for does, said in (
            (
                Exception("The node timed out during startup.\nmore"),
                "The node timed out during startup",
            ),
            (lambda *_, **__: ended.wait(), "no answer within 0.1 seconds"),
        ):
            ray.init.side_effect = does
            with pytest.raises(kind) as caught:
                prune(tiny(), batches(), recipe, workers=RayWorkers(address))
            assert str(caught.value).startswith(sentence.format(said))
    finally:
        ended.set()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_has_the_threads_of_its_parent(threads: int, cluster: RayWorkers) -> None:
    recipe, before = load_recipe("magnitude", {"propagation": "dense"}), torch.get_num_threads()

    def counting(context: LayerContext) -> Problem:
        raise InputError(f"{torch.get_num_threads()} threads")

    torch.set_num_threads(threads)
    try:
        with pytest.raises(InputError, match=f"^{threads} threads$"):
            prune(tiny(), batches(), recipe.model_copy(update={"objective": counting}), workers=cluster)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_runs(cluster: RayWorkers) -> None:
    recipe = load_recipe("fasp", {"propagation": "dense", "strict": True})
    with pytest.raises(StrictError, match="strict mode makes this an error"):
        prune(tiny(), [torch.ones(1, 8, dtype=torch.long)], recipe, workers=cluster)

    def broken(context: LayerContext) -> Problem:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        prune(tiny(), batches(), recipe.model_copy(update={"objective": broken}), workers=cluster)
