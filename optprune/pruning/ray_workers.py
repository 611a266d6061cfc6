"""Workers of a Ray cluster: Ray places the blocks' tasks, keeps what they take, and repeats those of workers that died."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from optprune.errors import InputError, OptpruneError, WorkerError
from optprune.pruning.errand import Errand, Kit, Outcome, run_errand
from optprune.pruning.workers import Crew, SideBySide

LOCAL = "local"
RETRIES = 3
"""how often Ray repeats a task whose worker died"""
KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class RayWorkers(SideBySide):
    """Tasks on the Ray cluster at an address; "local" starts one here and ends it with the run.

    A task takes as many CPUs as this process has threads, and one GPU where the model is on one. optprune is installed
    on every machine of the cluster, in the same versions.
    """

    address: str = LOCAL
    count: int | None = None
    """how many workers; None: as many as the cluster has CPUs or GPUs for"""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise InputError(f"there must be a worker at least, not {self.count}")

    @contextmanager
    def crew(self, kit: Kit) -> Iterator[Crew]:
        ray = _ray()
        mine = not ray.is_initialized()
        if mine:
            self._connect(ray, kit)
        cluster = _Cluster(ray, kit, self.count or _room(ray, kit))
        try:
            yield cluster
        finally:
            cluster.stop()
            if mine:
                ray.shutdown()

    def _connect(self, ray: Any, kit: Kit) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = self.address == LOCAL
        size = {"num_cpus": self.count * kit.threads, "include_dashboard": False} if own and self.count else {}
        kernels = {name: os.environ[name] for name in KERNELS if name in os.environ}
        try:
            ray.init(self.address, log_to_driver=False, runtime_env={"env_vars": kernels}, **size)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"there is no Ray cluster at {self.address!r}: {first}") from error


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError("Ray is not installed: pip install optprune[ray]") from error


def _room(ray: Any, kit: Kit) -> int:
    """How many tasks a cluster has room for at a time."""
    there = ray.cluster_resources()
    cpus = int(there.get("CPU", 0)) // kit.threads
    return max(1, min(cpus, int(there.get("GPU", 0))) if kit.device == "cuda" else cpus)


class _Cluster(Crew[Any]):
    def __init__(self, ray: Any, kit: Kit, count: int) -> None:
        self._ray, self.count = ray, count
        gpus = 1 if kit.device == "cuda" else 0
        self._kit, self._under_way = ray.put(kit), set[Any]()
        self._run = ray.remote(num_cpus=kit.threads, num_gpus=gpus, max_retries=RETRIES)(run_errand)

    def send(self, errand: Errand) -> Any:
        handle = self._run.remote(self._kit, self._ray.put(errand))
        self._under_way.add(handle)
        return handle

    def wait(self, handles: list[Any]) -> list[Any]:
        return self._ray.wait(handles)[0]

    def get(self, handle: Any) -> Outcome | OptpruneError:
        self._under_way.discard(handle)
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise WorkerError(
                f"a Ray worker ended in the middle of its work, and {RETRIES} others after it, perhaps since the "
                "memory is not enough: use fewer workers, or machines with more"
            ) from error

    def stop(self) -> None:
        """Give up what is still under way."""
        for handle in self._under_way:
            self._ray.cancel(handle, force=True)
