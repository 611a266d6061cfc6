"""Workers, which prune the blocks of a run one after the other in this process, or several in parallel.

With one block after the other, the layers of a block may still be shared among several devices. Parallel blocks need a
policy under which blocks are independent. The run then passes through the dense model and sends jobs, each with the
hidden states that enter a block; a worker fills that block of a skeleton and prunes it. The outcomes, in any order, are
written to the model or its journal. Weights and report do not depend on the workers.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import ClassVar, Generic, TypeVar

import torch

from optprune.calibration import POLICIES, Propagation
from optprune.errors import InputError, OptpruneError, WorkerError
from optprune.pruning.block import BlockJob, BlockOutcome, WorkerContext, run_job
from optprune.pruning.executors import DeviceExecutor, LayerExecutor, SerialExecutor
from optprune.pruning.run import Run
from optprune.system.wording import shown

MOST = 1000
"""the largest number of workers; no model has as many blocks, and no block as many layers"""
Handle = TypeVar("Handle")
DIED = (
    "a worker process died during its task, probably for lack of memory: use fewer workers, and in a script put the "
    "call under if __name__ == '__main__'"
)


class Workers(ABC):
    """A way to prune the blocks of a run."""

    several: ClassVar[bool] = True
    """whether there are several threads, processes or machines"""

    @abstractmethod
    def prune(self, run: Run) -> None:
        """Prune all blocks of a run that has begun."""

    def check(self, policy: Propagation) -> None:
        """Raise InputError where blocks under a policy cannot be pruned this way."""
        return

    def executor(self, device: torch.device) -> LayerExecutor:
        """Return the executor of the layers of a stage, for a model on a device."""
        return SerialExecutor()


class WorkerPool(ABC, Generic[Handle]):
    """Workers that have been started."""

    count: int
    """the number of workers"""

    @abstractmethod
    def send(self, job: BlockJob) -> Handle:
        """Submit a job."""

    @abstractmethod
    def wait(self, handles: list[Handle]) -> list[Handle]:
        """Wait until at least one job is done, and return those that are."""

    @abstractmethod
    def get(self, handle: Handle) -> BlockOutcome | OptpruneError:
        """Return the outcome of a job that is done."""


class Serial(Workers):
    """One block after the other, in this process."""

    several = False

    def prune(self, run: Run) -> None:
        for index in range(len(run.blocks)):
            run.prune_block(index)


class ParallelWorkers(Workers):
    """Several blocks at a time, each in one of several workers."""

    def check(self, policy: Propagation) -> None:
        if not policy.independent:
            free = " or ".join(name for name, one in POLICIES.items() if one.independent)
            raise InputError(
                f"under the policy {policy.name} every block depends on those before it, so workers cannot prune "
                f"blocks in parallel: choose the propagation {free}, or --workers without --ray to share layers"
            )

    def prune(self, run: Run) -> None:
        with self.pool(WorkerContext.of(run.decoder)) as pool:
            for outcome in outcomes(pool, run.jobs()):
                run.take(outcome)

    @abstractmethod
    def pool(self, context: WorkerContext) -> AbstractContextManager[WorkerPool]:
        """Return a context that starts the workers, and stops them at its end."""


@dataclass(frozen=True)
class Layers(Serial):
    """One block after the other, in this process, with several layers of a block solved at a time.

    For policies that follow the pruned model, whose blocks cannot be pruned in parallel. With single weights all layers
    of a block are solved together under `pruned`, and those that read the same input under `cross`, `partial` and
    `local`; with units there are two layers.
    """

    several = True

    count: int
    """number of layers that are solved at a time, each in a thread with as many threads of torch as this one"""
    devices: tuple[str, ...] = ()
    """the devices, such as cuda:0; by default the model's and, if that is a GPU, the following ones"""

    def __post_init__(self) -> None:
        check_count(self.count)
        if self.devices and len(self.devices) != self.count:
            raise InputError(f"{self.count} layers at a time need {self.count} devices, not {len(self.devices)}")

    def executor(self, device: torch.device) -> LayerExecutor:
        return DeviceExecutor(self.over(device))

    def over(self, home: torch.device) -> tuple[torch.device, ...]:
        """Return the devices for a model on a device; InputError for other kinds of device, which round differently."""
        named = tuple(torch.device(name) for name in self.devices)
        if any(device.type != home.type for device in named):
            raise InputError(
                f"layers of a model on {home} cannot be solved on {', '.join(self.devices)}: name devices of that kind"
            )
        if named or home.type != "cuda":
            return named or (home,) * self.count
        present = torch.cuda.device_count()
        return tuple(torch.device("cuda", ((home.index or 0) + number) % present) for number in range(self.count))


@dataclass(frozen=True)
class Processes(ParallelWorkers):
    """Processes that are spawned for a run, distributed over the GPUs if there are several.

    A script that uses them needs `if __name__ == "__main__":`, as always with spawned processes.
    """

    count: int

    def __post_init__(self) -> None:
        check_count(self.count)

    @contextmanager
    def pool(self, context: WorkerContext) -> Iterator[WorkerPool]:
        spawn = multiprocessing.get_context("spawn")
        numbers: SimpleQueue[int] = spawn.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        lifeline, held = spawn.Pipe(duplex=False)
        with ExitStack() as last:
            # Workers exit when the other end is closed: this process has died, or has stopped them.
            last.callback(lifeline.close)
            pool = ProcessPoolExecutor(self.count, spawn, _start_worker, (numbers, lifeline, context.device))
            last.callback(pool.shutdown, cancel_futures=True)
            last.callback(held.close)
            yield _ProcessPool(self.count, pool, context)


def outcomes(pool: WorkerPool[Handle], jobs: Iterator[BlockJob]) -> Iterator[BlockOutcome]:
    """Yield outcomes as they come, with only as many jobs made as workers soon need; raise a worker's error."""
    from optprune.program.memory import AHEAD

    under_way = [pool.send(job) for job in islice(jobs, AHEAD * pool.count)]
    while under_way:
        done = pool.wait(under_way)
        for handle in done:
            outcome = pool.get(handle)
            if isinstance(outcome, OptpruneError):
                raise outcome
            yield outcome
        under_way = [handle for handle in under_way if handle not in done]
        under_way += [pool.send(job) for job in islice(jobs, len(done))]


def check_count(count: int) -> None:
    """Raise InputError unless the number of workers is between 1 and the most that a run can use."""
    if count < 1:
        raise InputError(f"the number of workers cannot be {count}: give at least 1")
    if count > MOST:
        raise InputError(f"the number of workers cannot be {shown(count)}: give at most {MOST}, such as one a core")


def _start_worker(numbers: "SimpleQueue[int]", lifeline: Connection, device: str) -> None:
    """Prepare a worker process: ignore Ctrl-C, exit with the parent and take a GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too and stops its workers
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def _exit_with_parent(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


class _ProcessPool(WorkerPool["Future[bytes]"]):
    def __init__(self, count: int, pool: ProcessPoolExecutor, context: WorkerContext) -> None:
        self.count, self._pool, self._context = count, pool, context

    def send(self, job: BlockJob) -> "Future[bytes]":
        # Pickled here, because multiprocessing would put tensors into /dev/shm, which is small in a container.
        try:
            packed = pickle.dumps(job)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the recipe cannot be sent to another process ({error}): define its custom objects at the top level "
                "of a module, or leave out the workers"
            ) from error
        try:
            return self._pool.submit(_run, self._context, packed)
        except BrokenProcessPool as error:
            raise WorkerError(DIED) from error

    def wait(self, handles: "list[Future[bytes]]") -> "list[Future[bytes]]":
        done = wait(handles, return_when=FIRST_COMPLETED).done
        return [handle for handle in handles if handle in done]

    def get(self, handle: "Future[bytes]") -> BlockOutcome | OptpruneError:
        try:
            return pickle.loads(handle.result())
        except BrokenProcessPool as error:
            raise WorkerError(DIED) from error


def _run(context: WorkerContext, job: bytes) -> bytes:
    return pickle.dumps(run_job(context, pickle.loads(job)))
