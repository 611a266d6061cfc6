"""Calls: what a sub-module of a block is called with during calibration, and what it answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.lanes import Share
from optprune.calibration.stream import Stream, first_output, run_block


@dataclass(frozen=True)
class Calls:
    """What a sub-module is called with, and what it should answer, one entry a batch; those of this process's lanes."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: list[Float[Tensor, "... out"]]
    share: Share = field(default_factory=Share)
    """which batches of all the calls were"""
    places: Sequence[int] | None = None
    """the batches of the share that these are, where they are not all of them"""

    def lane(self, number: int) -> int:
        """Which of the process's lanes an entry is in."""
        return self.share.lane(number if self.places is None else self.places[number])

    def split(self, apart: int) -> tuple["Calls", "Calls"]:
        """The first batches, and the last `apart` of all."""
        every = range(len(self.targets))
        count = len(every) - self.share.apart(len(every), apart)
        return self._taken(every[:count]), self._taken(every[count:])

    def first(self, tokens: int) -> "Calls":
        """The first batches of each lane, as many as hold its share of that many tokens, or all."""
        each, held, taken = tokens / self.share.lanes.count, dict[int, int](), list[int]()
        for number, target in enumerate(self.targets):
            lane = self.lane(number)
            if held.get(lane, 0) < each:
                held[lane] = held.get(lane, 0) + target.shape[:-1].numel()
                taken.append(number)
        return self._taken(taken)

    def _taken(self, numbers: Sequence[int]) -> "Calls":
        places = [number if self.places is None else self.places[number] for number in numbers]
        return Calls([self.arguments[n] for n in numbers], [self.targets[n] for n in numbers], self.share, places)

    def each(self) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any], Tensor]]:
        """The lane, the arguments and the target of every entry."""
        for number, ((args, kwargs), target) in enumerate(zip(self.arguments, self.targets, strict=True)):
            yield self.lane(number), args, kwargs, target

    @property
    def tokens(self) -> int:
        """The tokens of the calls of all processes, which ask for it together."""
        own = sum(target.shape[:-1].numel() for target in self.targets)
        return sum(self.share.lanes.peers.exchange(own))


@contextmanager
def catching(block: nn.Module, paths: Sequence[str], share: Share) -> Iterator[dict[str, Calls]]:
    """The calls of sub-modules of a block meanwhile, by path: what goes in and what comes out, one entry a pass.

    The passes are over the batches of a `share`, one after the other.
    """
    calls = {path: Calls([], [], share) for path in paths}

    def hook(of: Calls) -> Any:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            of.arguments.append((args, kwargs))
            of.targets.append(first_output(output))

        return catch

    handles = [
        block.get_submodule(path).register_forward_hook(hook(of), with_kwargs=True) for path, of in calls.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def calls_of(block: nn.Module, path: str, stream: Stream) -> Calls:
    """What a sub-module of a block is called with on every batch of a stream, and what it answers."""
    with catching(block, [path], stream.share) as calls:
        for hidden, others in zip(stream.hidden, stream.arguments, strict=True):
            run_block(block, hidden, others)
    return calls[path]
