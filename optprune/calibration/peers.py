"""Peers that are processes of torchrun: they talk by torch.distributed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from optprune.calibration.lanes import Alone, Peers, Value
from optprune.errors import InputError, WorkerError
from optprune.system.environment import started_by_torchrun

PATIENCE = timedelta(days=30)
"""how long a process waits for another that is alive: a large layer takes its time"""
GONE = (
    "another process of the run has ended, as its own message says, or the connection to it is lost: start the run "
    "again with torchrun, and with --resume where it had begun"
)


class Group(Peers):
    """The default process group of torch.distributed, which has been made."""

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

    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.broadcast(_bytes(tensor), source)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        with _others_alive():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def exchange(self, value: Value) -> list[Value]:
        found: list[Value | None] = [None] * self.size
        with _others_alive():
            distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # all have given one


@contextmanager
def joined(device: str = "auto") -> Iterator[Peers]:
    """This process among those that torchrun started, for as long as the context lasts; alone, where it started none.

    `device` is auto, cpu or cuda; each process takes the GPU of its number on its machine. InputError where there is
    none for it.
    """
    if not started_by_torchrun():
        yield Alone()
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"under torchrun each process has a GPU of its own: give the device cpu or cuda, not {device}")
    if gpu:
        number, present = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= present:
            raise InputError(f"{number + 1} processes or more share {present} GPUs: start one a GPU with torchrun")
        torch.cuda.set_device(number)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Group()
    finally:
        distributed.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, which travel whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


@contextmanager
def _others_alive() -> Iterator[None]:
    """WorkerError where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(GONE) from error
