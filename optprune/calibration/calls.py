"""Calls: what a sub-module of a block is called with during calibration, and what it answers."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optprune.calibration.stream import Stream, first_output, run_block
from optprune.models.places import States

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""what a module is called with: the positional arguments, and the named ones"""


@dataclass(frozen=True)
class Calls:
    """What a sub-module is called with, and what it should answer, one entry a batch."""

    arguments: States[Arguments]
    targets: States[Tensor]
    """the answers [..., out]"""

    def split(self, apart: int) -> tuple["Calls", "Calls"]:
        """The first batches, and the last `apart`."""
        count = len(self.targets) - apart
        first = Calls(self.arguments[:count], self.targets[:count])
        return first, Calls(self.arguments[count:], self.targets[count:])

    def first(self, tokens: int) -> "Calls":
        """The first batches, as many as hold that many tokens, or all."""
        count = held = 0
        while held < tokens and count < len(self.targets):
            held += self.targets.shapes[count][:-1].numel()
            count += 1
        return Calls(self.arguments[:count], self.targets[:count])

    @property
    def tokens(self) -> int:
        return self.targets.tokens


@dataclass(frozen=True)
class Wanted:
    """The batches that calls are wanted of: the first, as many as hold some tokens, and the last."""

    tokens: float = math.inf
    apart: int = 0
    """how many of the last batches are wanted, and do not count among the first"""

    def of(self, stream: Stream) -> list[int]:
        """Their numbers."""
        count, held, chosen = len(stream.hidden) - self.apart, 0, list[int]()
        while held < self.tokens and len(chosen) < count:
            held += stream.hidden.shapes[len(chosen)][:-1].numel()
            chosen.append(len(chosen))
        return chosen + list(range(count, len(stream.hidden)))


EVERY = Wanted()
"""all batches"""


@contextmanager
def catching(block: nn.Module, paths: Sequence[str], stream: Stream, wanted: Wanted) -> Iterator[dict[str, Calls]]:
    """The calls of sub-modules of a block meanwhile, by path: what goes in and what comes out, one entry a pass.

    There is a pass for each batch of a stream; what the stream holds anyway is not kept twice.
    """
    place, batches = stream.hidden.place, set(wanted.of(stream))
    besides = _tensors(stream.arguments)
    calls = {path: Calls(States(place, besides=besides), States(place)) for path in paths}

    def hook(of: Calls) -> Any:
        passes = itertools.count()

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if next(passes) in batches:
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
    with catching(block, [path], stream, EVERY) as calls:
        for number in numbers:
            run_block(block, stream.hidden[number], arguments[number])
    return calls[path]


def _tensors(value: Any) -> set[int]:
    """The `id`s of the tensors in nested values."""
    if isinstance(value, Tensor):
        return {id(value)}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_tensors, parts))
