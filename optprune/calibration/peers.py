"""Peers: the processes that share a run; those of torchrun communicate by torch.distributed."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from optprune.errors import InputError, OptpruneError, WorkerError
from optprune.system.environment import started_by_torchrun

Value = TypeVar("Value")
PATIENCE = timedelta(days=30)
"""the longest time that a process waits for another, because solving a large layer takes long"""
GONE = (
    "another process of the run has ended (see its own message) or the connection to it is lost: start the run again "
    "with torchrun, and with --resume if it had begun"
)


class Peers(ABC):
    """The processes that share a run. All of them make every call, in the same order."""

    rank: int
    """the number of this process"""
    size: int
    """the number of processes"""

    @abstractmethod
    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with those that the process before this one sends."""

    @abstractmethod
    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the process after this one."""

    @abstractmethod
    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Fill contiguous tensors with those of one process, bit for bit."""

    @abstractmethod
    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by their sums over all processes: the same numbers in each process."""

    @abstractmethod
    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank. A value is small and can be pickled."""


@dataclass(frozen=True)
class SingleProcess(Peers):
    """A run of one process."""

    rank: int = 0
    size: int = 1

    def receive(self, tensors: Sequence[Tensor]) -> None:
        raise AssertionError("no process is before the first")

    def send(self, tensors: Sequence[Tensor]) -> None:
        raise AssertionError("no process is after the last")

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        pass

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        pass

    def all_gather(self, value: Value) -> list[Value]:
        return [value]


def from_first(peers: Peers, make: Callable[[], Value]) -> Value:
    """Return in all processes what the first one makes; an OptpruneError of the first is raised in all."""
    made: Value | OptpruneError | None = None
    if peers.rank == 0:
        try:
            made = make()
        except OptpruneError as error:
            made = error
    found: Any = peers.all_gather(made)[0]
    if isinstance(found, OptpruneError):
        raise found
    return found


class TorchPeers(Peers):
    """The default process group of torch.distributed, which exists."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def receive(self, tensors: Sequence[Tensor]) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.recv(_bytes(tensor), self.rank - 1)

    def send(self, tensors: Sequence[Tensor]) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.send(_bytes(tensor), self.rank + 1)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.broadcast(_bytes(tensor), source)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def all_gather(self, value: Value) -> list[Value]:
        found: list[Value | None] = [None] * self.size
        with _others_alive():
            distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # every process has given one


@contextmanager
def joined(device: str = "auto") -> Iterator[Peers]:
    """Make this process one of torchrun's within the context, or a single process if torchrun did not start it.

    `device` is auto, cpu or cuda. Each process takes the GPU of its local rank; InputError where there is no such GPU.
    """
    if not started_by_torchrun():
        yield SingleProcess()
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"under torchrun the device cannot be {device}: give cpu, or cuda for one GPU a process")
    if gpu:
        number, present = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= present:
            raise InputError(f"torchrun started more processes than the {present} GPUs: start one for each GPU")
        torch.cuda.set_device(number)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield TorchPeers()
    finally:
        distributed.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:
    """Return a view of the same memory as bytes, which can be sent in any dtype."""
    return tensor.view(-1).view(torch.uint8)


@contextmanager
def _others_alive() -> Iterator[None]:
    """Raise WorkerError where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(GONE) from error
