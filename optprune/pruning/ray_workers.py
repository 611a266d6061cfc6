"""Workers of a Ray cluster, which places the jobs of blocks and repeats those of dead workers."""

import importlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from optprune.calibration import Propagation
from optprune.errors import InputError, OptpruneError, WorkerError
from optprune.pruning.workers import (
    BlockJob,
    BlockOutcome,
    ParallelWorkers,
    WorkerContext,
    WorkerPool,
    check_count,
    run_job,
)
from optprune.system.environment import KERNELS
from optprune.system.wording import install

LOCAL = "local"
PROBE, STARTING = 10.0, 180.0
"""the seconds that an address may take to accept a connection, and a cluster to start or to answer"""
RETRIES = 3
"""the number of times that Ray repeats a task whose worker died"""


@dataclass(frozen=True)
class RayWorkers(ParallelWorkers):
    """Tasks on the Ray cluster at an address; "local" starts a private cluster here and ends it with the run.

    A task takes as many CPUs as this process has threads, and one GPU if the model is on one. Every machine of the
    cluster needs the same versions of optprune and its dependencies.
    """

    address: str = LOCAL
    count: int | None = None
    """number of workers; None for as many as the cluster has CPUs or GPUs for"""

    def __post_init__(self) -> None:
        if self.count is not None:
            check_count(self.count)

    def check(self, policy: Propagation) -> None:
        super().check(policy)
        connected = _ray().is_initialized()
        if self.address != LOCAL and not connected:
            check_listening(self.address)

    @contextmanager
    def pool(self, context: WorkerContext) -> Iterator[WorkerPool]:
        ray = _ray()
        owned = not ray.is_initialized()
        with for_this_machine() if owned and self.address == LOCAL else nullcontext():
            if owned:
                self._connect(ray, context)
            try:
                if owned and self.address == LOCAL:
                    check_closed(ray)
                there = self._room(ray, context)
                cluster = _Cluster(ray, context, there if self.count is None else min(self.count, there))
                try:
                    yield cluster
                finally:
                    cluster.stop()
            finally:
                if owned:
                    ray.shutdown()

    def _connect(self, ray: Any, context: WorkerContext) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        size = (
            {}
            if self.address != LOCAL
            else {"include_dashboard": False, "num_cpus": self.count and self.count * context.threads}
        )
        kernels = {name: os.environ[name] for name in KERNELS if name in os.environ}
        given = {"log_to_driver": False, "runtime_env": {"env_vars": kernels}, **size}
        try:
            within(STARTING, lambda: ray.init(self.address, **given))
        except Exception as error:  # Ray raises plain exceptions too
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            if self.address == LOCAL:
                raise WorkerError(
                    f"Ray did not start on this machine: {first}; free memory or processors, or use --workers in its "
                    "place"
                ) from error
            raise InputError(
                f"there is no Ray cluster at {self.address!r}: {first}; start one there, or give another address"
            ) from error

    def _room(self, ray: Any, context: WorkerContext) -> int:
        """Return the number of tasks that the cluster can run at a time; InputError where it is 0."""
        gpu, tasks = context.device == "cuda", 0
        for node in ray.nodes():
            there = node["Resources"] if node["Alive"] else {}
            own = int(there.get("CPU", 0)) // context.threads
            tasks += min(own, int(there.get("GPU", 0))) if gpu else own
        if not tasks:
            raise InputError(
                f"a worker needs {context.threads} CPUs{' and a GPU' * gpu} and no machine of the Ray cluster at "
                f"{self.address!r} has them: lower OMP_NUM_THREADS, or add such a machine"
            )
        return tasks


def check_listening(address: str) -> None:
    """Raise InputError where an address is no host and port, or nobody listens there, for which Ray would wait long."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return  # Ray finds the place
    if not host or not port.isdecimal():
        raise InputError(f"the Ray address {address!r} is no host and port: write it as 127.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"nobody listens at the Ray address {address!r} ({error}): start a cluster there, or give another address"
        ) from error


def within(seconds: float, call: Callable[[], object]) -> None:
    """Call a function in a thread of its own, and raise what it raises; TimeoutError where it is not done in time."""
    raised = list[BaseException]()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    # A daemon does not keep the process alive where the call never returns.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if raised:
        raise raised[0]


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError(f"Ray is not installed: {install('ray')}") from error


class _Cluster(WorkerPool[Any]):
    def __init__(self, ray: Any, context: WorkerContext, count: int) -> None:
        self._ray, self.count = ray, count
        gpus = 1 if context.device == "cuda" else 0
        self._context, self._under_way = ray.put(context), set[Any]()
        self._run = ray.remote(num_cpus=context.threads, num_gpus=gpus, max_retries=RETRIES)(run_job)

    def send(self, job: BlockJob) -> Any:
        handle = self._run.remote(self._context, self._ray.put(job))
        self._under_way.add(handle)
        return handle

    def wait(self, handles: list[Any]) -> list[Any]:
        return self._ray.wait(handles)[0]

    def get(self, handle: Any) -> BlockOutcome | OptpruneError:
        self._under_way.discard(handle)
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise WorkerError(
                f"a Ray worker died during its task, and {RETRIES} others after it, probably for lack of memory: use "
                "fewer workers, or machines with more memory"
            ) from error

    def stop(self) -> None:
        """Cancel the tasks that are still running."""
        for handle in self._under_way:
            self._ray.cancel(handle, force=True)


REACHABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""the variable that makes Ray listen on the loopback address only, where it is 0"""
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""the variables for the mode of authentication, the token and the file of the token"""


@contextmanager
def for_this_machine() -> Iterator[None]:
    """Make `ray.init` start a cluster that is closed to others, for the duration of the context.

    Ray would write its own token to a file that all users of the machine can read. This token is in the environment of
    its processes, which only their owner can read.
    """
    before = {name: os.environ.get(name) for name in (REACHABLE, MODE, TOKEN, TOKEN_FILE)}
    constants: Any = importlib.import_module("ray._private.ray_constants")
    reachable = getattr(constants, "ENABLE_RAY_CLUSTER", None)  # the value that Ray read at its import
    os.environ |= {REACHABLE: "0", MODE: "token", TOKEN: secrets.token_hex(32)}
    os.environ.pop(TOKEN_FILE, None)
    constants.ENABLE_RAY_CLUSTER = False
    _read_again()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = reachable
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_again()


def check_closed(ray: Any) -> None:
    """Raise OptpruneError where the cluster listens on an address that others could reach."""
    for node in ray.nodes():
        address = str(node["NodeManagerAddress"])
        if not ip_address(address).is_loopback:
            raise OptpruneError(
                f"this version of Ray ({ray.__version__}) would listen on {address}, which other machines may reach: "
                "install the version that the extra ray requires"
            )


def _read_again() -> None:
    """Make Ray read the variables again, which it caches at its import or its first cluster."""
    with suppress(ImportError, AttributeError):
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
