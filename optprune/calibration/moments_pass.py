"""The moments pass: inside a block, the inputs of its layers are reduced to moments batch by batch."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from optprune.calibration.partial_sums import OrderedSum
from optprune.calibration.stream import SLOW, TOKENS_PER_BATCH, Stream, activation_bytes, block_pass, run_block
from optprune.measure.memory import clock
from optprune.models import Decoder
from optprune.models.mixture import SeparateExperts
from optprune.moments import AT_ONCE, InputMoments, MomentSums
from optprune.numerics.gram import packed_size
from optprune.work import Work

SUM, AVERAGE = 8, 4
"""the bytes of a number in sums over tokens, which are float64, and in averages, which are float32"""


@dataclass(frozen=True)
class Collected:
    """Moments of one pass over a block, by layer path."""

    moments: dict[str, InputMoments]
    held_out: dict[str, InputMoments]
    """the moments of the held-out batches; empty where there are none"""
    gram_seconds: float
    """the seconds of the Gram products of the inputs x*"""
    forward_seconds: float
    """the seconds of the forward pass of the stream alone; it covers the whole block where `output` was given"""


def collect(
    block: nn.Module,
    stream: Stream,
    taps: Sequence[str],
    *,
    reference: tuple[nn.Module, Stream] | None = None,
    correction: float = 1.0,
    held_out: int = 0,
    output: Stream | None = None,
    to_end: bool = False,
) -> Collected:
    """Return the moments of the inputs x* of the tapped layers of a block over all batches, added in partial sums.

    `reference` is the dense block with its stream, which gives the dense inputs x of the same tokens; the moments have
    the share `correction` of the drift x* - x. The last `held_out` batches have moments of their own. An `output`
    stream is advanced through the block in the same pass; it may be the stream itself. A pass ends at the last tap,
    unless there is an `output` or `to_end` is set.
    """
    count, device, share = len(stream.hidden), stream.hidden.device, stream.share
    first_apart = count - share.apart(count, held_out)
    fitted: dict[str, OrderedSum[MomentSums]] = {}
    apart: dict[str, OrderedSum[MomentSums]] = {}
    gram_seconds = forward_seconds = 0.0
    arguments = stream.arguments
    routes = nullcontext if reference is None else partial(same_routes, block, reference[0])
    for index in range(count):
        hidden = stream.hidden[index]
        before = clock(device)
        ideal: dict[str, Tensor] = {}
        with routes():
            actual, after = run_block(block, hidden, arguments[index], taps, to_end=to_end or output is not None)
            forward_seconds += clock(device) - before
            if reference is not None:
                dense_block, dense = reference
                ideal, _ = run_block(dense_block, dense.hidden[index], dense.arguments[index], taps, to_end=False)
        sums = fitted if index < first_apart else apart
        before = clock(device)
        for path, inputs in actual.items():
            if path not in fitted:
                fresh = partial(MomentSums, inputs.shape[-1], inputs.device, with_dense=reference is not None)
                fitted[path], apart[path] = (OrderedSum(share.partial_sums, fresh) for _ in range(2))
            sums[path].at(share.part(index)).add(inputs, ideal.get(path))
        # With dense inputs two more products of the same size are made.
        gram_seconds += (clock(device) - before) / (1 if reference is None else 3)
        if output is not None:
            output.hidden[index] = after
    if output is not None:
        output.past(output.hidden)
    # Popped, so that no more than one layer's sums and averages are in memory together.
    moments = {path: fitted.pop(path).total().moments_or_zeros().with_drift(correction) for path in list(fitted)}
    held = {path: apart.pop(path).total().moments_or_zeros().with_drift(correction) for path in list(apart) if held_out}
    return Collected(moments, held, gram_seconds, forward_seconds)


def moments_work(decoder: Decoder, index: int, taps: Collection[str], tokens: int) -> Work:
    """Return the work of a pass of so many tokens through a dense block that collects the moments at the taps.

    Its memory is that of the float64 sums, one batch's product and the activations, or that of the averages.
    """
    passing = block_pass(decoder, index) * tokens
    if not taps:
        return passing
    widths = sorted(decoder.layer(index, tap).in_features for tap in taps)
    inside = activation_bytes(decoder, index, min(tokens, TOKENS_PER_BATCH))
    deviations = AVERAGE * min(AT_ONCE, tokens) * widths[-1]
    adding = SUM * sum(map(packed_size, widths)) + (AVERAGE + SUM) * widths[-1] ** 2 + deviations + inside
    averaging = AVERAGE * sum(width**2 for width in widths) + SUM * packed_size(widths[-1])
    return passing + gram_work(decoder, index, taps) * tokens + Work(bytes=max(adding, averaging))


def gram_work(decoder: Decoder, index: int, taps: Collection[str]) -> Work:
    """Return the work of one token in the Gram products of the taps' inputs."""
    return Work(2 * SLOW * sum(decoder.layer(index, tap).in_features ** 2 for tap in taps))


def moments_bytes(decoder: Decoder, index: int, taps: Collection[str]) -> int:
    """Return the memory of the moments at the taps, as they are kept while the layers are solved."""
    return AVERAGE * sum(decoder.layer(index, tap).in_features ** 2 for tap in taps)


@contextmanager
def same_routes(block: nn.Module, reference: nn.Module) -> Iterator[None]:
    """Route tokens in the `reference` to the experts that `block` chooses for them, in a context for one pass of each.

    So the inputs of an expert belong to the same tokens in both. By its own router the reference would send some of
    them elsewhere, since its hidden states differ. The block runs first, and both may be the same module.
    """
    routes: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            routes.setdefault(path, args[1])

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
