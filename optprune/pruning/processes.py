"""Workers that are processes of this machine."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue

import torch

from optprune.errors import InputError, OptpruneError, WorkerError
from optprune.pruning.jobs import BlockJob, BlockOutcome, WorkerContext, run_job
from optprune.pruning.workers import ParallelWorkers, WorkerPool, check_count


@dataclass(frozen=True)
class Processes(ParallelWorkers):
    """Processes that are spawned for a run, shared out among the GPUs where there are several.

    A script that uses them keeps what it runs under `if __name__ == "__main__":`, as ever where processes are spawned.
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
            # Workers go when nobody holds the other end: this process has died, or has no more use for them.
            last.callback(lifeline.close)
            pool = ProcessPoolExecutor(self.count, spawn, _begin, (numbers, lifeline, context.device))
            last.callback(pool.shutdown, cancel_futures=True)
            last.callback(held.close)
            yield _Pool(self.count, pool, context)


def _begin(numbers: "SimpleQueue[int]", lifeline: Connection, device: str) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def _end_with(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


class _Pool(WorkerPool["Future[bytes]"]):
    def __init__(self, count: int, pool: ProcessPoolExecutor, context: WorkerContext) -> None:
        self.count, self._pool, self._context = count, pool, context

    def send(self, job: BlockJob) -> "Future[bytes]":
        # Pickled here: multiprocessing would have tensors travel in /dev/shm, which is small in a container.
        try:
            packed = pickle.dumps(job)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the recipe cannot be handed to another process ({error}): define what is your own in it at the top "
                "level of a module, or leave the workers out"
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


DIED = (
    "a worker process ended in the middle of its work, perhaps since the memory is not enough for so many: use fewer "
    "workers, and in a script have all that runs under if __name__ == '__main__'"
)


def _run(context: WorkerContext, job: bytes) -> bytes:
    return pickle.dumps(run_job(context, pickle.loads(job)))
