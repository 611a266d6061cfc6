"""Calls of a block's sub-modules during calibration: their arguments and their target outputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.partial_sums import Share
from optprune.calibration.stream import SLOW, TOKENS_PER_BATCH, Stream, run_block, stream_bytes
from optprune.models import Decoder
from optprune.models.mixture import (
    SeparateExperts,
    answer_factors,
    experts_in,
    logits_of,
    mixture_of,
    read_by_experts,
)
from optprune.models.places import States
from optprune.numerics.tensors import first_output
from optprune.problems import ExpertChoice
from optprune.work import Work, product

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""the positional and the named arguments of a call"""
MOST_PRODUCTS = 2**26
"""the largest number of products of expert outputs in memory: a million tokens with 8 experts, 4096 with 128"""


@dataclass(frozen=True)
class Calls:
    """Calls of a sub-module with their target outputs, one entry a batch, of this process's share of the batches."""

    arguments: States[Arguments]
    targets: States[Tensor]
    """the target outputs [..., out]"""
    share: Share = field(default_factory=Share)
    """the share of all batches that the process has"""
    places: Sequence[int] | None = None
    """the batches of the share that the entries belong to; None for all"""

    def part(self, number: int) -> int:
        """Return which of the process's partial sums an entry belongs to."""
        return self.share.part(number if self.places is None else self.places[number])

    def split(self, apart: int) -> tuple["Calls", "Calls"]:
        """Return the first batches, and the last `apart` of all."""
        every = range(len(self.targets))
        count = len(every) - self.share.apart(len(every), apart)
        return self._taken(every[:count]), self._taken(every[count:])

    def first(self, tokens: int) -> "Calls":
        """Return the first batches of each partial sum, as many as hold its part of the tokens, or all."""
        parts = [self.part(number) for number in range(len(self.targets))]
        return self._taken(_first(parts, self.targets.shapes, tokens / self.share.partial_sums.count))

    def _taken(self, numbers: Sequence[int]) -> "Calls":
        places = [number if self.places is None else self.places[number] for number in numbers]
        return Calls(self.arguments.part(numbers), self.targets.part(numbers), self.share, places)

    def each(self) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any], Tensor]]:
        """Yield the partial sum, the arguments and the target of every entry."""
        # By number: to enumerate a zip would keep the first entry in memory to the end.
        for number in range(len(self.targets)):
            (args, kwargs), target = self.arguments[number], self.targets[number]
            yield self.part(number), args, kwargs, target

    @property
    def tokens(self) -> int:
        """The tokens of the calls of all processes, which read this together."""
        return sum(self.share.partial_sums.peers.all_gather(self.targets.tokens))


@dataclass(frozen=True)
class Wanted:
    """Selection of batches: the first ones, as many as hold some tokens, and the last ones.

    Each partial sum has an equal part of the tokens.
    """

    tokens: float = math.inf
    apart: int = 0
    """the number of last batches, which do not count among the first"""

    def of(self, stream: Stream) -> list[int]:
        """Return the numbers of the selected batches of a stream."""
        share, count = stream.share, len(stream.hidden)
        first = count - share.apart(count, self.apart)
        parts = [share.part(number) for number in range(first)]
        chosen = _first(parts, stream.hidden.shapes[:first], self.tokens / share.partial_sums.count)
        return chosen + list(range(first, count))


EVERY = Wanted()
"""all batches"""


def _first(parts: Sequence[int], shapes: Sequence[torch.Size], tokens: float) -> list[int]:
    """Return the first entries of each partial sum, as many as hold `tokens`, by the part and the shape of each."""
    held, taken = dict[int, int](), list[int]()
    for number, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        if held.get(part, 0) < tokens:
            held[part] = held.get(part, 0) + shape[:-1].numel()
            taken.append(number)
    return taken


@contextmanager
def catching(block: nn.Module, paths: Sequence[str], stream: Stream, wanted: Wanted) -> Iterator[dict[str, Calls]]:
    """Record the calls of sub-modules of a block within the context, by path: inputs and outputs, one entry a pass.

    There is one pass for each batch of a stream. Tensors that the stream holds are not kept twice.
    """
    with _catching(block, paths, stream, range(len(stream.hidden)), wanted.of(stream)) as calls:
        yield calls


@contextmanager
def _catching(
    block: nn.Module, paths: Sequence[str], stream: Stream, passes: Sequence[int], numbers: Sequence[int]
) -> Iterator[dict[str, Calls]]:
    """Record the calls for the batches `numbers`, where the passes visit the batches `passes`."""
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
    """Run selected batches of a stream through a block; return the calls of a sub-module with its outputs."""
    numbers, arguments = wanted.of(stream), stream.arguments
    with _catching(block, [path], stream, numbers, numbers) as calls:
        for number in numbers:
            run_block(block, stream.hidden[number], arguments[number])
    return calls[path]


@torch.no_grad()
def with_mixed_targets(calls: Calls, module: nn.Module, dense: States[Tensor], share: float) -> Calls:
    """Return the calls with the targets (1 - share) y + share `dense`, where y is the output of `module` for a call.

    `dense` holds the targets afterwards.
    """
    for number, (_, args, kwargs, _) in enumerate(calls.each()):
        dense[number] = torch.lerp(first_output(module(*args, **kwargs)), dense[number], share)
    return replace(calls, targets=dense)


def _tensors(value: Any) -> set[int]:
    """Return the `id`s of the tensors in nested values."""
    if isinstance(value, Tensor):
        return {id(value)}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_tensors, parts))


# -- the experts of a mixture


@torch.no_grad()
def mixture_calls(decoder: Decoder, index: int, stream: Stream) -> Calls:
    """Run a stream through a block; return the calls of its mixture with the outputs of that."""
    mixture, block = decoder.architecture.mixture, decoder.blocks[index]
    assert mixture is not None
    calls = calls_of(block, mixture.entry, stream)
    if mixture.module:
        return calls
    module, targets = mixture_of(block, mixture), States[Tensor](stream.hidden.place)
    for _, args, kwargs, _ in calls.each():
        targets.append(module(*args, **kwargs))
    return replace(calls, targets=targets)


@torch.no_grad()
def expert_choice(decoder: Decoder, index: int, calls: Calls, keep: int) -> ExpertChoice:
    """Return the problem of choosing `keep` experts of a block, for the tokens that its mixture is called with.

    The first tokens are used, as many as have at most MOST_PRODUCTS products of the outputs of two experts. Processes
    that share the calls call this together and get the same problem.
    """
    mixture, config, block = decoder.architecture.mixture, decoder.model.config, decoder.blocks[index]
    assert mixture is not None
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    count, device = experts.count, next(router.parameters()).device
    most = left = MOST_PRODUCTS // count**2
    logits = [torch.zeros(0, count, device=device)]
    products = [torch.zeros(0, count, count, device=device)]
    for _, args, _, _ in calls.each():
        tokens = args[0].reshape(-1, args[0].shape[-1])[:left]
        left -= len(tokens)
        if not len(tokens):
            break
        logits.append(logits_of(block, mixture, tokens).float())
        inputs = read_by_experts(block, mixture, tokens)
        outputs = torch.stack([experts.outputs(inputs, number) for number in range(count)], 1).float()
        products.append(outputs @ outputs.mT)
    scores, pairs = (rows[:most] for rows in _gathered(calls, torch.cat(logits), torch.cat(products)))
    factors = answer_factors(block, mixture, mixture.scale(config)).to(pairs.device)
    pairs = pairs * (factors[:, None] * factors).to(pairs.dtype)  # as if each expert gave so much more
    correction = router.get_parameter(mixture.correction).detach() if mixture.correction else None
    return ExpertChoice(scores, pairs, decoder.experts_for_a_token, mixture.normalised(config), keep, correction)


def expert_choice_work(decoder: Decoder, index: int, tokens: int) -> Work:
    """Return the work of `expert_choice` for so many tokens: all experts' outputs, and their products.

    Its memory is that of the calls, of all experts' outputs for a batch, and of the products.
    """
    mixture, shape, hidden = decoder.architecture.mixture, decoder.shape(index), decoder.model.config.hidden_size
    assert mixture is not None
    count = shape.experts
    held = min(tokens, MOST_PRODUCTS // max(count, 1) ** 2)
    outputs = 4 * min(held, TOKENS_PER_BATCH) * count * hidden
    # The products once more in float64, for the errors.
    memory = 2 * stream_bytes(decoder, tokens) + outputs + held * count**2 * (4 + 8)
    answers = SLOW * product(held, hidden, len(mixture.layout.layers) * shape.mlp_width * count)
    return Work(answers + product(held * count, hidden, count), memory)


def _gathered(calls: Calls, *own: Tensor) -> list[Tensor]:
    """Return the rows of all processes, in the order of the batches, which are contiguous in a process."""
    peers = calls.share.partial_sums.peers
    if peers.size == 1:
        return list(own)
    shared = peers.all_gather([rows.cpu() for rows in own])
    return [torch.cat(parts).to(rows.device) for parts, rows in zip(zip(*shared, strict=True), own, strict=True)]
