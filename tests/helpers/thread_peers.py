"""Peers that are threads of this process, each with a model of its own: what several processes do, quickly."""

import threading
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any, TypeVar

from torch import Tensor

from optprune.calibration.peers import Peers

Result = TypeVar("Result")
LONGEST = 60
"""the seconds after which a thread no longer waits for another"""


class Meeting:
    """What the threads have in common."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=LONGEST)
        self.table: list[Any] = [None] * size
        self.links = [Queue[Any]() for _ in range(size)]


class ThreadPeers(Peers):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.sent = 0
        """the tensors that were sent on"""

    @classmethod
    def alone(cls) -> "ThreadPeers":
        """One thread, which meets nobody."""
        return cls(Meeting(1), 0)

    def receive(self, tensors: Sequence[Tensor]) -> None:
        for tensor, other in zip(tensors, self.meeting.links[self.rank].get(timeout=LONGEST), strict=True):
            tensor.copy_(other)

    def send(self, tensors: Sequence[Tensor]) -> None:
        self.sent += len(tensors)
        self.meeting.links[self.rank + 1].put([tensor.clone() for tensor in tensors])

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        found = self.all_gather([tensor.clone() for tensor in tensors])
        for tensor, other in zip(tensors, found[source], strict=True):
            tensor.copy_(other)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        found = self.all_gather([tensor.clone() for tensor in tensors])
        for tensor, others in zip(tensors, zip(*found, strict=True), strict=True):
            tensor.copy_(sum(others[1:], others[0]))

    def all_gather(self, value: Any) -> list[Any]:
        self.meeting.table[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.table)
        self.meeting.barrier.wait()
        return found


def together(size: int, run: Callable[[ThreadPeers], Result]) -> list[Result]:
    """What a function gives in each of so many threads; the first error of theirs is raised."""
    meeting, results, errors = Meeting(size), dict[int, Result](), dict[int, BaseException]()

    def work(rank: int) -> None:
        try:
            results[rank] = run(ThreadPeers(meeting, rank))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for _, error in sorted(errors.items()) if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (own or list(errors.values()))[0]
    return [results[rank] for rank in range(size)]
