"""Calls: what a sub-module of a block is called with during calibration, and what it answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.stream import Stream, first_output, run_block


@dataclass(frozen=True)
class Calls:
    """What a sub-module is called with, and what it should answer, one entry a batch."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: list[Float[Tensor, "... out"]]

    def split(self, apart: int) -> tuple["Calls", "Calls"]:
        """The first batches, and the last `apart`."""
        count = len(self.targets) - apart
        first = Calls(self.arguments[:count], self.targets[:count])
        return first, Calls(self.arguments[count:], self.targets[count:])

    def first(self, tokens: int) -> "Calls":
        """The first batches, as many as hold that many tokens, or all."""
        count = held = 0
        while held < tokens and count < len(self.targets):
            held += self.targets[count].shape[:-1].numel()
            count += 1
        return Calls(self.arguments[:count], self.targets[:count])

    @property
    def tokens(self) -> int:
        return sum(target.shape[:-1].numel() for target in self.targets)


@contextmanager
def catching(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Calls]]:
    """The calls of sub-modules of a block meanwhile, by path: what goes in and what comes out, one entry a pass."""
    calls = {path: Calls([], []) for path in paths}

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
    with catching(block, [path]) as calls:
        for hidden, others in zip(stream.hidden, stream.arguments, strict=True):
            run_block(block, hidden, others)
    return calls[path]
