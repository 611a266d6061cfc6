"""Lanes: the fixed division of the calibration batches, so that it does not matter which process goes over which.

The batches are cut into contiguous lanes. Each has sums of its own, and those of all lanes are added in their order, on
every process. So the number of lanes decides how a sum is rounded, and the number of processes does not.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from optprune.errors import InputError

Value = TypeVar("Value")


class Peers(ABC):
    """The processes that share a run, each with a part of the lanes: all of them make every call, in the same order."""

    rank: int
    """the number of this process"""
    size: int
    """how many there are"""

    @abstractmethod
    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with what the process before this one sends."""

    @abstractmethod
    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the process after this one."""

    @abstractmethod
    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        """Fill contiguous tensors with those of one process, bit for bit."""

    @abstractmethod
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by their sums over all processes: the same numbers in each of them."""

    @abstractmethod
    def exchange(self, value: Value) -> list[Value]:
        """What all processes have given, in their order; a value is small, and can be pickled."""


@dataclass(frozen=True)
class Alone(Peers):
    """One process, which has nobody to share with."""

    rank: int = 0
    size: int = 1

    def receive(self, tensors: Sequence[Tensor]) -> None:
        raise AssertionError("no process is before the first")

    def send(self, tensors: Sequence[Tensor]) -> None:
        raise AssertionError("no process is after the last")

    def spread(self, tensors: Sequence[Tensor], source: int) -> None:
        pass

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        pass

    def exchange(self, value: Value) -> list[Value]:
        return [value]


@dataclass(frozen=True)
class Lanes:
    """A number of lanes, and the processes that share them: each has equally many, next to each other."""

    count: int = 1
    peers: Peers = Alone()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"there must be a lane at least, not {self.count}")
        if self.count % self.peers.size:
            raise InputError(
                f"{self.count} lanes cannot be shared equally by {self.peers.size} processes: take a multiple of "
                f"{self.peers.size} lanes, or a number of processes that divides {self.count}"
            )

    @property
    def own(self) -> int:
        """How many lanes a process has."""
        return self.count // self.peers.size

    @property
    def numbers(self) -> range:
        """The lanes of this process."""
        return range(self.peers.rank * self.own, (self.peers.rank + 1) * self.own)

    def share(self, total: int) -> "Share":
        """The part of this process in so many batches."""
        bounds = [lane * total // self.count for lane in range(self.count + 1)]
        mine = bounds[self.numbers.start : self.numbers.stop + 1]
        return Share(self, tuple(bound - mine[0] for bound in mine[:-1]), mine[0], total - mine[-1])

    def check(self, batches: Sequence[Tensor]) -> None:
        """Raise InputError where a lane would have no batch."""
        if len(batches) < self.count:
            raise InputError(
                f"{self.count} lanes need as many calibration batches, and there are {len(batches)}: take fewer lanes, "
                "or give more samples"
            )


@dataclass(frozen=True)
class Share:
    """A process's part of a division: contiguous batches, which it numbers from 0."""

    lanes: Lanes = Lanes()
    starts: tuple[int, ...] = (0,)
    """the first batch of each of its lanes"""
    before: int = 0
    """how many batches others have before these"""
    after: int = 0
    """how many batches others have after these"""

    def of(self, batches: Sequence[Value]) -> list[Value]:
        """This process's batches, of all."""
        return list(batches[self.before : len(batches) - self.after])

    def lane(self, batch: int) -> int:
        """Which of the process's lanes a batch of its is in."""
        return bisect_right(self.starts, batch) - 1

    def apart(self, count: int, held_out: int) -> int:
        """How many of the process's own `count` batches are among the last `held_out` of all."""
        return min(max(held_out - self.after, 0), count)


class Sums(Protocol):
    """What is added up over batches."""

    def join(self, later: Self) -> None:
        """Add the sums of the lane that comes next."""
        ...

    def state(self) -> list[Tensor]:
        """All there is to them, in contiguous tensors whose shapes and dtypes the sums of all lanes share."""
        ...

    def restore(self, state: Sequence[Tensor]) -> None:
        """Become the sums of such a state."""
        ...


Kind = TypeVar("Kind", bound=Sums)


class LaneSums(Generic[Kind]):
    """The sums of this process's lanes, one lane after the other, and in the end those of all lanes there are."""

    def __init__(self, lanes: Lanes, fresh: Callable[[], Kind]) -> None:
        """`fresh` makes sums of nothing."""
        self._lanes, self._fresh = lanes, fresh
        self._parts: list[Kind] = []
        self._begun = 0

    def at(self, lane: int) -> Kind:
        """The sums of a lane of this process; when one begins, those before it are done."""
        while self._begun <= lane:
            self._parts.append(self._fresh())
            self._begun += 1
            # The first process has all that comes before: two sums are there at a time, however many lanes there are.
            if self._lanes.peers.rank == 0 and len(self._parts) > 2:
                self._parts[0].join(self._parts.pop(1))
        return self._parts[-1]

    def total(self) -> Kind:
        """The sums of all lanes, added in their order. They are this object's last."""
        self.at(self._lanes.own - 1)
        peers, parts = self._lanes.peers, self._parts
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
            peers.spread(state, last)
            total.restore(state)
        return total


class TensorSums:
    """Tensors that are added up."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def add(self, *more: Tensor) -> None:
        """Add to each."""
        for tensor, other in zip(self.tensors, more, strict=True):
            tensor.add_(other)

    def join(self, later: "TensorSums") -> None:
        self.add(*later.tensors)

    def state(self) -> list[Tensor]:
        return list(self.tensors)

    def restore(self, state: Sequence[Tensor]) -> None:
        self.tensors = tuple(state)
