"""Workers: they prune the blocks of a run, one after the other here, or several side by side.

One after the other, the layers of a block may still be shared among several devices. Side by side needs a policy under
which blocks are independent. The run then passes through the dense model and gives out jobs, each with the hidden
states that enter a block; a worker fills that block of a skeleton and prunes it. The outcomes, in any order, are put
into the model or its journal: weights and report are those of a run without workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch

from optprune.calibration import POLICIES, Propagation
from optprune.errors import InputError, OptpruneError
from optprune.program.memory import AHEAD
from optprune.pruning.executors import DeviceExecutor, LayerExecutor, SerialExecutor
from optprune.pruning.jobs import BlockJob, BlockOutcome, WorkerContext
from optprune.pruning.run import Run
from optprune.system.launched import started_by_torchrun
from optprune.system.wording import shown

MOST = 1000
"""the most workers: no model has so many blocks, and no block so many layers"""
Handle = TypeVar("Handle")


class Workers(ABC):
    """A way to prune the blocks of a run."""

    @abstractmethod
    def prune(self, run: Run) -> None:
        """Prune all blocks of a run that has begun."""

    def check(self, policy: Propagation) -> None:
        """Raise InputError where the blocks of a policy cannot be pruned so."""
        return

    def executor(self, device: torch.device) -> LayerExecutor:
        """Return what solves the layers of a stage, for a model on a device."""
        return SerialExecutor()


class Serial(Workers):
    """One block after the other, in this process."""

    def prune(self, run: Run) -> None:
        for index in range(len(run.blocks)):
            run.prune_block(index)


@dataclass(frozen=True)
class Layers(Serial):
    """One block after the other, in this process, with several layers of a block solved at a time.

    For policies that follow the pruned model, whose blocks cannot be shared. With single weights all layers of a block
    are solved together under `pruned`, and those that read the same input under `cross` and `local`; units have two.
    """

    count: int
    """layers that are solved at a time, each in a thread with as many threads of torch as this one"""
    devices: tuple[str, ...] = ()
    """the devices, such as cuda:0; by default the model's, and where that is a GPU those after it too"""

    def __post_init__(self) -> None:
        check_count(self.count)
        if self.devices and len(self.devices) != self.count:
            raise InputError(f"{self.count} layers at a time need {self.count} devices, not {len(self.devices)}")

    def executor(self, device: torch.device) -> LayerExecutor:
        return DeviceExecutor(self.over(device))

    def over(self, home: torch.device) -> tuple[torch.device, ...]:
        """Return the devices for a model on a device; InputError where one is of another kind, which rounds otherwise."""
        named = tuple(torch.device(name) for name in self.devices)
        if any(device.type != home.type for device in named):
            raise InputError(
                f"the layers of a model on {home} are solved on devices of that kind, not on {', '.join(self.devices)}"
            )
        if named or home.type != "cuda":
            return named or (home,) * self.count
        present = torch.cuda.device_count()
        return tuple(torch.device("cuda", ((home.index or 0) + number) % present) for number in range(self.count))


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


class ParallelWorkers(Workers):
    """Several blocks at a time, each by one of several workers."""

    def check(self, policy: Propagation) -> None:
        if not policy.independent:
            free = " or ".join(name for name, one in POLICIES.items() if one.independent)
            raise InputError(
                f"under the policy {policy.name} every block depends on those before it, so that workers have no "
                f"blocks to share: choose the propagation {free}, or --workers without --ray, which share the layers"
            )

    def prune(self, run: Run) -> None:
        with self.pool(WorkerContext.of(run.decoder)) as pool:
            for outcome in outcomes(pool, run.jobs()):
                run.take(outcome)

    @abstractmethod
    def pool(self, context: WorkerContext) -> AbstractContextManager[WorkerPool]:
        """Return a context that starts the workers, and stops them at its end."""


def outcomes(pool: WorkerPool[Handle], jobs: Iterator[BlockJob]) -> Iterator[BlockOutcome]:
    """Yield outcomes as they come. Only as many jobs are made as workers soon need. A worker's error is raised."""
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


def workers_of(policy: Propagation, count: int | None = None, ray: str | None = None) -> Workers:
    """Return the workers that a command asks for: `count` of them here, or those of a Ray cluster at an address.

    Here they are processes with a block each or, where blocks depend on each other, threads with a layer each.
    InputError where the blocks of the policy cannot be pruned so.
    """
    from optprune.pruning.processes import Processes
    from optprune.pruning.ray_workers import RayWorkers

    if started_by_torchrun() and (count is not None or ray is not None):
        raise InputError("the processes that torchrun started are the workers: leave --workers and --ray out")
    several = Processes if policy.independent else Layers
    here = Serial() if count is None or count == 1 else several(count)
    workers = here if ray is None else RayWorkers(ray, count)
    workers.check(policy)
    return workers


def check_count(count: int) -> None:
    """Raise InputError unless there is at least one worker, and at most as many as a run can use."""
    if count < 1:
        raise InputError(f"there must be a worker at least, not {count}")
    if count > MOST:
        raise InputError(f"there can be {MOST} workers at most, not {shown(count)}: give as many as there are cores")
