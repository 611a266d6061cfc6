"""Partial sums: a fixed division of the calibration batches, so that processes can share them without other results.

The batches are cut into contiguous parts. Each part has a partial sum of its own, and the partial sums are added in
order, on every process. So the number of partial sums decides how a sum is rounded; the number of processes does not.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from optprune.calibration.peers import Peers, SingleProcess, Value
from optprune.errors import InputError
from optprune.system.wording import counted

SINGLE = SingleProcess()


@dataclass(frozen=True)
class PartialSums:
    """The number of partial sums, and the processes that share them: each has equally many, next to each other."""

    count: int = 1
    peers: Peers = SINGLE

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"the number of partial sums cannot be {self.count}: give at least 1")
        if self.count % self.peers.size:
            raise InputError(
                f"{counted(self.count, 'partial sum')} cannot be shared equally by {self.peers.size} processes: use "
                f"a multiple of {self.peers.size}, or a number of processes that divides {self.count}"
            )

    @property
    def own(self) -> int:
        """The number of partial sums of each process."""
        return self.count // self.peers.size

    @property
    def numbers(self) -> range:
        """The numbers of this process's partial sums."""
        return range(self.peers.rank * self.own, (self.peers.rank + 1) * self.own)

    def share(self, total: int) -> "Share":
        """Return this process's share of `total` batches."""
        bounds = [part * total // self.count for part in range(self.count + 1)]
        own = bounds[self.numbers.start : self.numbers.stop + 1]
        return Share(self, tuple(bound - own[0] for bound in own[:-1]), own[0], total - own[-1])

    def check(self, batches: Sequence[Tensor]) -> None:
        """Raise InputError where a partial sum would have no batch."""
        if len(batches) < self.count:
            raise InputError(
                f"{self.count} partial sums need at least as many calibration batches, and there are {len(batches)}: "
                "use fewer partial sums, or more samples"
            )


@dataclass(frozen=True)
class Share:
    """The contiguous batches of one process, which it numbers from 0."""

    partial_sums: PartialSums = PartialSums()
    starts: tuple[int, ...] = (0,)
    """the first batch of each of its partial sums"""
    before: int = 0
    """the number of batches of the processes before it"""
    after: int = 0
    """the number of batches of the processes after it"""

    def of(self, batches: Sequence[Value]) -> list[Value]:
        """Return this process's batches out of all."""
        return list(batches[self.before : len(batches) - self.after])

    def part(self, batch: int) -> int:
        """Return which of the process's partial sums a batch belongs to; both are numbered within the process."""
        return bisect_right(self.starts, batch) - 1

    def apart(self, count: int, held_out: int) -> int:
        """Return how many of the process's own `count` batches are among the last `held_out` of all."""
        return min(max(held_out - self.after, 0), count)


class Sums(Protocol):
    """Sums over batches."""

    def join(self, later: Self) -> None:
        """Add the next partial sum."""
        ...

    def state(self) -> list[Tensor]:
        """Return the whole state as contiguous tensors, whose shapes and dtypes all partial sums share."""
        ...

    def restore(self, state: Sequence[Tensor]) -> None:
        """Take over such a state."""
        ...


Kind = TypeVar("Kind", bound=Sums)


class OrderedSum(Generic[Kind]):
    """The partial sums of this process, filled one after the other, and in the end the total of all processes."""

    def __init__(self, partial_sums: PartialSums, fresh: Callable[[], Kind]) -> None:
        """Start without partial sums; `fresh` returns an empty one."""
        self._partial_sums, self._fresh = partial_sums, fresh
        self._parts: list[Kind] = []
        self._begun = 0

    def at(self, part: int) -> Kind:
        """Return a partial sum of this process to add to. Once one is begun, those before it are complete."""
        while self._begun <= part:
            self._parts.append(self._fresh())
            self._begun += 1
            # The first process can add its parts at once: it holds two of them at a time, however many there are.
            if self._partial_sums.peers.rank == 0 and len(self._parts) > 2:
                self._parts[0].join(self._parts.pop(1))
        return self._parts[-1]

    def total(self) -> Kind:
        """Return the sum of all partial sums, added in order. This object is empty afterwards."""
        self.at(self._partial_sums.own - 1)
        peers, parts = self._partial_sums.peers, self._parts
        self._parts = []
        if peers.rank:
            before = self._fresh()
            state = before.state()
            peers.receive(state)
            before.restore(state)
            parts.insert(0, before)
        total = parts.pop(0)
        while parts:
            total.join(parts.pop(0))
        if peers.size > 1:
            state, last = total.state(), peers.size - 1
            if peers.rank < last:
                peers.send(state)
            peers.broadcast(state, last)
            total.restore(state)
        return total


class TensorSums:
    """Sums of tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def add(self, *more: Tensor) -> None:
        """Add one tensor to each sum."""
        for tensor, other in zip(self.tensors, more, strict=True):
            tensor.add_(other)

    def join(self, later: "TensorSums") -> None:
        self.add(*later.tensors)

    def state(self) -> list[Tensor]:
        return list(self.tensors)

    def restore(self, state: Sequence[Tensor]) -> None:
        self.tensors = tuple(state)
