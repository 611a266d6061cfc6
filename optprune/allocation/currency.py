"""Prices of blocks with all or fewer units: in weights, in floating-point operations, or in seconds on this machine.

A budget over the model is counted in one of these. Prices of attention and MLP add up, so narrower blocks are priced
for each sub-block alone.
"""

import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from optprune.calibration import Stream, first_inputs
from optprune.calibration.stream import run_block
from optprune.errors import InputError
from optprune.measure.memory import clock
from optprune.models import BlockShape, Decoder, LinkedUnits

REPEATS = 5
"""the number of timings in a median"""
MOST_TIMED = 8
"""the most counts of units that are timed; times between them are interpolated"""


@dataclass(frozen=True, eq=False)
class Prices:
    """Price of every block of a model, and its price with another number of units of one kind."""

    unit: str
    """the unit in words that follow a share, such as "the decoder's linear weights" """
    whole: tuple[float, ...]
    narrowed: Callable[[int, LinkedUnits, int], float]
    """the price by block, unit kind and number of units; zero units is a block without that sub-block"""


def prices_of(
    decoder: Decoder,
    budget: str,
    tokens: int,
    kinds: Iterable[LinkedUnits],
    on_timed: Callable[[int, int], None] = lambda done, total: None,
) -> Prices:
    """Return the prices of a recipe's budget: "parameters", "flops" or "time" of a forward pass over so many tokens.

    Times are measured here, for the given unit kinds; InputError where the model has too few positions. `on_timed` is
    called with the number of widths timed and their total.
    """
    if budget == "parameters":
        return _by_formula(decoder, "the decoder's linear weights", decoder.weights_of)
    check_tokens(decoder, tokens)
    if budget == "flops":
        return _by_formula(decoder, "the blocks' operations", lambda shape: operations(decoder, shape, tokens))
    return _measured(decoder, tokens, list(kinds), on_timed)


def check_tokens(decoder: Decoder, tokens: int) -> None:
    """Raise InputError where a forward pass cannot have so many tokens."""
    positions = getattr(decoder.model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise InputError(f"allocation.tokens is {tokens}, but the model has {positions} positions: lower it")


def operations(decoder: Decoder, shape: BlockShape, tokens: int) -> float:
    """Return the floating-point operations of a block for a token of a causal forward pass over `tokens`, on average.

    Two for each linear weight that the token uses, and two for each query head, visible position and dimension of a
    head and of its values.
    """
    heads = decoder.heads.of(shape)
    visible = (tokens + 1) / 2
    attention = shape.kv_heads * heads.group * visible * (heads.dim + shape.value_dim)
    return 2 * (_weights_used(decoder, shape) + attention)


def _weights_used(decoder: Decoder, shape: BlockShape) -> float:
    """Return the linear weights of a block that a token uses, with its own experts only."""
    weights = decoder.weights_of(shape)
    if not shape.experts:
        return weights
    one = weights - decoder.weights_of(replace(shape, experts=shape.experts - 1))
    return weights - one * (shape.experts - decoder.experts_for_a_token)


def _by_formula(decoder: Decoder, unit: str, cost: Callable[[BlockShape], float]) -> Prices:
    shapes = decoder.shapes()
    whole = tuple(map(cost, shapes))
    return Prices(unit, whole, lambda block, kind, count: cost(kind.with_count(shapes[block], count)))


def _measured(decoder: Decoder, tokens: int, kinds: list[LinkedUnits], on_timed: Callable[[int, int], None]) -> Prices:
    """Return prices in seconds of a forward pass of a block, timed once for each shape that blocks have."""
    shapes = decoder.shapes()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    stream = first_inputs(decoder, [ids])
    whole: dict[BlockShape, float] = {}
    tables: dict[tuple[BlockShape, LinkedUnits], tuple[list[int], list[float]]] = {}
    done, total = 0, len(set(shapes)) * len(kinds)
    for block, shape in enumerate(shapes):
        stream.block = block
        if shape in whole:
            continue
        with decoder.resident(block):
            whole[shape] = _seconds(decoder, block, stream)
            for kind in kinds:
                on_timed(done, total)
                done += 1
                there = kind.there(shape)
                if there:
                    counts = sorted({max(1, round(there * step / MOST_TIMED)) for step in range(1, MOST_TIMED)})
                    times = [_without(decoder, block, stream, kind)]
                    times += [_narrower(decoder, block, stream, kind, count) for count in counts]
                    # Timings are noisy: a wider block must cost no less, and each unit something.
                    rising = np.minimum(np.maximum.accumulate(times), whole[shape])
                    tables[shape, kind] = [0, *counts, there], [*rising.tolist(), whole[shape]]
    on_timed(done, total)

    def narrowed(block: int, kind: LinkedUnits, count: int) -> float:
        counts, times = tables[shapes[block], kind]
        least = 1e-6 * whole[shapes[block]] * (count / counts[-1] - 1)
        return float(np.interp(count, counts, times)) + least

    unit = f"the blocks' time on {tokens} tokens"
    return Prices(unit, tuple(whole[shape] for shape in shapes), narrowed)


def _seconds(decoder: Decoder, block: int, stream: Stream) -> float:
    times, hidden = [], stream.hidden[0]
    for _ in range(REPEATS + 1):
        before = clock(hidden.device)
        run_block(decoder.blocks[block], hidden, stream.arguments[0])
        times.append(clock(hidden.device) - before)
    # The first timing is a warm-up.
    return statistics.median(times[1:])


def _without(decoder: Decoder, block: int, stream: Stream, kind: LinkedUnits) -> float:
    with decoder.without([(block, kind.part)]):
        return _seconds(decoder, block, stream)


def _narrower(decoder: Decoder, block: int, stream: Stream, kind: LinkedUnits, count: int) -> float:
    with ExitStack() as narrowed:
        for layers in kind.layers(decoder, block):
            narrowed.enter_context(decoder.narrowed(block, layers, layers.channels.first(count)))
        return _seconds(decoder, block, stream)
