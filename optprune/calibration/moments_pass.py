"""The moments pass: inside a block, the inputs of its layers are reduced to moments batch by batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from optprune.calibration.partial_sums import OrderedSum
from optprune.calibration.routing import same_routes
from optprune.calibration.stream import Stream, run_block
from optprune.measure.clock import clock
from optprune.moments import InputMoments
from optprune.sums import MomentSums


@dataclass(frozen=True)
class Collected:
    """What one pass over a block gave, by layer path."""

    moments: dict[str, InputMoments]
    held_out: dict[str, InputMoments]
    """the moments of the batches kept apart; empty when there were none"""
    gram_seconds: float
    """the seconds of the Gram products of the inputs x*"""
    forward_seconds: float
    """the seconds of the forward pass on the stream alone, which is of the whole block where `output` was given"""


def collect(
    block: nn.Module,
    stream: Stream,
    taps: Sequence[str],
    *,
    reference: tuple[nn.Module, Stream] | None = None,
    held_out: int = 0,
    output: Stream | None = None,
    to_end: bool = False,
) -> Collected:
    """The moments of the inputs x* of the tapped layers of a block, over all batches, added in partial sums.

    `reference` is the dense block with its stream: it gives the dense inputs x of the same tokens. The last
    `held_out` batches are kept apart. Where `output` is given, it is advanced through the block in the same pass; it
    may be the stream itself. A pass ends at the last tap unless there is an `output`, or with `to_end`.
    """
    count, device, share = len(stream.hidden), stream.hidden.device, stream.share
    first_apart = count - share.apart(count, held_out)
    calibration: dict[str, OrderedSum[MomentSums]] = {}
    kept_apart: dict[str, OrderedSum[MomentSums]] = {}
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
        sums = calibration if index < first_apart else kept_apart
        before = clock(device)
        for path, inputs in actual.items():
            if path not in calibration:
                fresh = partial(MomentSums, inputs.shape[-1], inputs.device, with_dense=reference is not None)
                calibration[path], kept_apart[path] = (
                    OrderedSum(share.partial_sums, fresh),
                    OrderedSum(share.partial_sums, fresh),
                )
            sums[path].at(share.part(index)).add(inputs, ideal.get(path))
        # With dense inputs two more products of the same size are made.
        gram_seconds += (clock(device) - before) / (1 if reference is None else 3)
        if output is not None:
            output.hidden[index] = after
    if output is not None:
        output.past(output.hidden)
    # Popped, so that no more than one layer's sums and its averages are there together.
    moments = {path: calibration.pop(path).total().moments_or_zeros() for path in list(calibration)}
    held = {path: kept_apart.pop(path).total().moments_or_zeros() for path in list(kept_apart) if held_out}
    return Collected(moments, held, gram_seconds, forward_seconds)
