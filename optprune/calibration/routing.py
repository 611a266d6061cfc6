"""Routes: which experts tokens go to, where two passes of a block must agree on that to be compared token by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from optprune.models.mixture import SeparateExperts


@contextmanager
def same_routes(block: nn.Module, reference: nn.Module) -> Iterator[None]:
    """Each pass of the `reference` sends tokens to the experts that the last pass of the block sent them to.

    So the inputs of an expert are those of the same tokens in both. By its own router the reference would send some
    of them elsewhere, since its hidden states are others.
    """
    routes: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            routes[path] = args[1]

        return hook

    def send(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0], routes[path], *args[2:]

        return hook

    there = {path: module for path, module in block.named_modules() if isinstance(module, SeparateExperts)}
    handles = [module.register_forward_pre_hook(note(path)) for path, module in there.items()]
    handles += [reference.get_submodule(path).register_forward_pre_hook(send(path)) for path in there]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
