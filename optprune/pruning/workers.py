"""Workers: who prunes the blocks of a run, one after the other here, or several side by side.

One after the other, the layers of a block may still be shared among several devices. Side by side is for the policies
under which blocks are independent. The run walks through the dense model and gives out jobs, each with what enters
a block; a worker fills that block of a skeleton and prunes it. What comes back, in any order, is put into the model or
its journal: the weights and the report are those of a run without workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch

from optprune.calibration import POLICIES
from optprune.errors import InputError, OptpruneError
from optprune.pruning.executors import DeviceExecutor
from optprune.pruning.jobs import BlockJob, BlockOutcome, WorkerContext
from optprune.pruning.run import Run
from optprune.recipe import Recipe
from optprune.system.environment import started_by_torchrun
from optprune.system.wording import shown

AHEAD = 2
"""jobs that are under way for each worker: the one that it does, and the next"""
MOST = 1000
"""the most workers: no model has so many blocks, nor a block so many layers"""
Handle = TypeVar("Handle")


class Workers(ABC):
    """Who prunes the blocks of a run."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise InputError where a recipe's blocks cannot be pruned so."""

    @abstractmethod
    def prune(self, run: Run) -> None:
        """Prune all blocks of a run that has begun."""


class Serial(Workers):
    """One block after the other, in this process."""

    def check(self, recipe: Recipe) -> None:
        pass

    def prune(self, run: Run) -> None:
        for index in range(len(run.decoder.blocks)):
            run.prune_block(index)


@dataclass(frozen=True)
class Layers(Workers):
    """One block after the other, in this process; its layers that need no other's answer several at a time.

    For the policies that follow the pruned model, whose blocks cannot be shared. Single weights have all layers of a
    block to share under `pruned`, and those that read the same input under `cross` and `local`; of units there are two.
    """

    count: int
    """how many layers are solved at a time, each in a thread with as many threads of torch as this one"""
    devices: tuple[str, ...] = ()
    """where, such as cuda:0; by default on the model's device, and where that is a GPU on those after it too"""

    def __post_init__(self) -> None:
        check_count(self.count)
        if self.devices and len(self.devices) != self.count:
            raise InputError(f"{self.count} layers at a time need {self.count} devices, not {len(self.devices)}")

    def check(self, recipe: Recipe) -> None:
        pass

    def prune(self, run: Run) -> None:
        run.executor = DeviceExecutor(self.over(run.decoder.model.device))
        Serial().prune(run)

    def over(self, home: torch.device) -> tuple[torch.device, ...]:
        """The devices, for a model on a device; InputError where one is of another kind, which rounds otherwise."""
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
    """Workers that are at work."""

    count: int
    """how many they are"""

    @abstractmethod
    def send(self, job: BlockJob) -> Handle:
        """Have an job done some time."""

    @abstractmethod
    def wait(self, handles: list[Handle]) -> list[Handle]:
        """Wait until one at least is done, and tell which are."""

    @abstractmethod
    def get(self, handle: Handle) -> BlockOutcome | OptpruneError:
        """What came of an job that is done."""


class ParallelWorkers(Workers):
    """Several blocks at a time, each by one of several workers."""

    def check(self, recipe: Recipe) -> None:
        if not recipe.policy.independent:
            free = " or ".join(name for name, policy in POLICIES.items() if policy.independent)
            raise InputError(
                f"under the policy {recipe.policy.name} every block depends on those before it, so that workers have "
                f"no blocks to share: choose the propagation {free}, or --workers without --ray, which share the layers"
            )

    def prune(self, run: Run) -> None:
        with self.pool(WorkerContext.of(run.decoder)) as pool:
            for outcome in outcomes(pool, run.jobs()):
                run.take(outcome)

    @abstractmethod
    def pool(self, context: WorkerContext) -> AbstractContextManager[WorkerPool]:
        """The workers for a run, for as long as the context lasts."""


def outcomes(pool: WorkerPool[Handle], jobs: Iterator[BlockJob]) -> Iterator[BlockOutcome]:
    """What comes of jobs, as it comes; no more are made than workers soon need. An error of a worker's is raised."""
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


def workers_of(recipe: Recipe, count: int | None = None, ray: str | None = None) -> Workers:
    """The workers that a command asks for: so many here, or those of a Ray cluster at an address.

    Those here are processes with a block each, or where blocks hang on each other threads with a layer each.
    InputError where the recipe's blocks cannot be pruned so.
    """
    from optprune.pruning.processes import Processes
    from optprune.pruning.ray_workers import RayWorkers

    if started_by_torchrun() and (count is not None or ray is not None):
        raise InputError("the processes that torchrun started are the workers: leave --workers and --ray out")
    several = Processes if recipe.policy.independent else Layers
    here = Serial() if count is None or count == 1 else several(count)
    workers = here if ray is None else RayWorkers(ray, count)
    workers.check(recipe)
    return workers


def check_count(count: int) -> None:
    """Raise InputError where there is no worker at all, or more than any run has use for."""
    if count < 1:
        raise InputError(f"there must be a worker at least, not {count}")
    if count > MOST:
        raise InputError(f"there can be {MOST} workers at most, not {shown(count)}: give as many as there are cores")
