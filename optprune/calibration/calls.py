"""Calls: what a sub-module of a block is called with during calibration, and what it answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.partial_sums import Share
from optprune.calibration.stream import Stream, run_block
from optprune.models.places import States
from optprune.numerics.modules import first_output

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""what a module is called with: the positional arguments, and the named ones"""


@dataclass(frozen=True)
class Calls:
    """What a sub-module is called with, and what it should answer, one entry a batch; those of this process's share."""

    arguments: States[Arguments]
    targets: States[Tensor]
    """the answers [..., out]"""
    share: Share = field(default_factory=Share)
    """which batches of all the calls were"""
    places: Sequence[int] | None = None
    """the batches of the share that these are, where they are not all of them"""

    def part(self, number: int) -> int:
        """Return which of the process's partial sums an entry belongs to."""
        return self.share.part(number if self.places is None else self.places[number])

    def split(self, apart: int) -> tuple["Calls", "Calls"]:
        """The first batches, and the last `apart` of all."""
        every = range(len(self.targets))
        count = len(every) - self.share.apart(len(every), apart)
        return self._taken(every[:count]), self._taken(every[count:])

    def first(self, tokens: int) -> "Calls":
        """The first batches of each partial sum, as many as hold its part of that many tokens, or all."""
        partial_sums = [self.part(number) for number in range(len(self.targets))]
        return self._taken(_first(partial_sums, self.targets.shapes, tokens / self.share.partial_sums.count))

    def _taken(self, numbers: Sequence[int]) -> "Calls":
        places = [number if self.places is None else self.places[number] for number in numbers]
        return Calls(self.arguments.part(numbers), self.targets.part(numbers), self.share, places)

    def each(self) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any], Tensor]]:
        """The partial sum, the arguments and the target of every entry, one after the other."""
        # By number: to enumerate a zip would keep the first entry in memory to the end.
        for number in range(len(self.targets)):
            (args, kwargs), target = self.arguments[number], self.targets[number]
            yield self.part(number), args, kwargs, target

    @property
    def tokens(self) -> int:
        """The tokens of the calls of all processes, which ask for it together."""
        return sum(self.share.partial_sums.peers.all_gather(self.targets.tokens))


@dataclass(frozen=True)
class Wanted:
    """The batches that calls are wanted of: the first, as many as hold some tokens, and the last.

    Of the tokens each partial sum has an equal part.
    """

    tokens: float = math.inf
    apart: int = 0
    """how many of the last batches are wanted, and do not count among the first"""

    def of(self, stream: Stream) -> list[int]:
        """The numbers of those that are in a stream."""
        share, count = stream.share, len(stream.hidden)
        first = count - share.apart(count, self.apart)
        partial_sums = [share.part(number) for number in range(first)]
        chosen = _first(partial_sums, stream.hidden.shapes[:first], self.tokens / share.partial_sums.count)
        return chosen + list(range(first, count))


EVERY = Wanted()
"""all batches"""


def _first(partial_sums: Sequence[int], shapes: Sequence[torch.Size], tokens: float) -> list[int]:
    """Return the first entries of each partial sum, as many as hold `tokens`, by the part and the shape of each."""
    held, taken = dict[int, int](), list[int]()
    for number, (part, shape) in enumerate(zip(partial_sums, shapes, strict=True)):
        if held.get(part, 0) < tokens:
            held[part] = held.get(part, 0) + shape[:-1].numel()
            taken.append(number)
    return taken


@contextmanager
def catching(block: nn.Module, paths: Sequence[str], stream: Stream, wanted: Wanted) -> Iterator[dict[str, Calls]]:
    """The calls of sub-modules of a block meanwhile, by path: what goes in and what comes out, one entry a pass.

    There is a pass for each batch of a stream; what the stream holds anyway is not kept twice.
    """
    with _catching(block, paths, stream, range(len(stream.hidden)), wanted.of(stream)) as calls:
        yield calls


@contextmanager
def _catching(
    block: nn.Module, paths: Sequence[str], stream: Stream, passes: Sequence[int], numbers: Sequence[int]
) -> Iterator[dict[str, Calls]]:
    """The calls with the batches of these numbers, where the passes are over others of the stream too."""
    place, batches = stream.hidden.place, set(numbers)
    besides = _tensors(stream.arguments)
    calls = {path: Calls(States(place, besides=besides), States(place), stream.share, numbers) for path in paths}

    def hook(of: Calls) -> Any:
        passing = iter(passes)

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if next(passing) in batches:
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


def calls_of(block: nn.Module, path: str, stream: Stream, wanted: Wanted = EVERY) -> Calls:
    """What a sub-module of a block is called with on batches of a stream, and what it answers."""
    numbers, arguments = wanted.of(stream), stream.arguments
    with _catching(block, [path], stream, numbers, numbers) as calls:
        for number in numbers:
            run_block(block, stream.hidden[number], arguments[number])
    return calls[path]


def block_calls(stream: Stream, targets: States[Tensor], wanted: Wanted) -> Calls:
    """What the current block is called with on the batches wanted of a stream, which is to answer these targets."""
    numbers, arguments = wanted.of(stream), stream.arguments
    called = (((stream.hidden[number],), arguments[number]) for number in numbers)
    return Calls(States(stream.hidden.place, called, _tensors(arguments)), targets, stream.share, numbers)


def _tensors(value: Any) -> set[int]:
    """The `id`s of the tensors in nested values."""
    if isinstance(value, Tensor):
        return {id(value)}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_tensors, parts))
