"""Streams: the hidden states that calibration keeps, those between two blocks, and how a block moves them on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.partial_sums import PartialSums, Share
from optprune.errors import InputError, NumericalError
from optprune.models import Decoder
from optprune.models.places import States
from optprune.numerics.modules import first_output
from optprune.numerics.precision import full_precision


@dataclass
class Stream:
    """The hidden states that enter the current block, one tensor a batch, with the other arguments of all blocks.

    Where processes share the batches, those of this one.
    """

    hidden: States[Tensor]
    others: list[list[dict[str, Any]]]
    """the arguments of each block by batch and block: blocks with a sliding window get another mask than the rest"""
    block: int = 0
    """the current block's number"""
    share: Share = field(default_factory=Share)
    """which batches of all these are"""

    @property
    def arguments(self) -> list[dict[str, Any]]:
        """The current block's other arguments, by batch."""
        return [blocks[self.block] for blocks in self.others]

    def copy(self) -> "Stream":
        """A second stream from the same hidden states."""
        return Stream(self.hidden[:], self.others, self.block, self.share)

    def with_hidden(self, hidden: Iterable[Tensor]) -> "Stream":
        """A second stream at the same block, from other hidden states, which are taken one at a time."""
        return Stream(self.hidden.anew(hidden), self.others, self.block, self.share)

    def past(self, hidden: States[Tensor]) -> None:
        """Go to the next block, which gets these hidden states."""
        self.hidden, self.block = hidden, self.block + 1


class _Reached(Exception):  # control flow, not an error
    """Ends a forward pass early."""


@contextmanager
def calibrating(decoder: Decoder) -> Iterator[None]:
    """Evaluation mode, no gradients, no TF32; everything is put back afterwards."""
    modes = [(module, module.training) for module in decoder.model.modules()]
    decoder.model.eval()
    try:
        with torch.no_grad(), full_precision():
            yield
    finally:
        for module, training in modes:
            module.training = training


def hold_out(batches: list[Tensor], share: float) -> tuple[list[Tensor], int]:
    """The batches cut so that the last ones hold a share of the sequences, one at least, and how many those are."""
    if not share:
        return batches, 0
    count = sum(len(batch) for batch in batches)
    apart = max(1, round(share * count))
    if apart >= count:
        raise InputError(
            f"held_out {share:g} of {count} calibration sequences leaves none to calibrate on: give more samples"
        )
    kept, held = list(batches), list[Tensor]()
    while apart:
        last = kept.pop()
        taken = min(apart, len(last))
        held.append(last[len(last) - taken :])
        if taken < len(last):
            kept.append(last[: len(last) - taken])
        apart -= taken
    return kept + held[::-1], len(held)


def first_tokens(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first sequences of the batches, as many as hold that many tokens, or all."""
    taken: list[Tensor] = []
    for batch in batches:
        missing = tokens - sum(part.numel() for part in taken)
        if missing > 0:
            taken.append(batch[: -(-missing // batch.shape[1])])
    return taken


def first_inputs(decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums | None = None) -> Stream:
    """Run the embeddings on token batches [batch, length] and stop where the first block begins.

    With `partial_sums`, only on this process's share of the batches.

    Where the attention of some blocks is of another kind, the first batch of each shape goes past all blocks, without
    going through them.
    """
    if not batches:
        raise InputError("there are no calibration batches: give at least one tensor of token ids [batch, length]")
    share = Share() if partial_sums is None else partial_sums.share(len(batches))
    stream, count = Stream(States(decoder.states), [], share=share), len(decoder.blocks)
    kinds = decoder.model.config.to_dict().get("layer_types") or []
    alike = len(set(kinds[:count])) < 2
    shared: dict[torch.Size, list[dict[str, Any]]] = {}
    caught: list[tuple[Tensor, dict[str, Any]]] = []
    last = 1

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others = (args[0], _named(block, args) | kwargs) if args else (kwargs["hidden_states"], kwargs)
        caught.append((hidden, {name: value for name, value in others.items() if name != "hidden_states"}))
        if len(caught) == last:
            raise _Reached

    device = next(decoder.model.get_input_embeddings().parameters()).device
    handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in decoder.blocks]
    try:
        for batch in share.of(batches):
            caught.clear()
            # Without padding, masks and positions depend on the shape alone, so one copy serves all batches of a shape.
            last = 1 if alike or batch.shape in shared else count
            with suppress(_Reached), _passing(decoder.blocks), decoder.embeddings_in_dtype():
                decoder.model(input_ids=batch.to(device), use_cache=False)
            stream.hidden.append(caught[0][0])
            others = [arguments for _, arguments in caught]
            stream.others.append(shared.setdefault(batch.shape, others * count if alike else others))
    finally:
        for handle in handles:
            handle.remove()
    return stream


def _named(block: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """What a block is called with by position, behind the hidden states, by name."""
    names = list(signature(type(block).forward).parameters)[1 : len(args) + 1]
    return dict(zip(names[1:], args[1:], strict=True))


@contextmanager
def _passing(blocks: nn.ModuleList) -> Iterator[None]:
    """Blocks that give back what they get, for as long as the context lasts."""
    before = [vars(block).pop("forward", None) for block in blocks]  # where somebody has replaced it
    for block in blocks:
        vars(block)["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def run_block(
    block: nn.Module, hidden: Tensor, arguments: dict[str, Any], taps: Sequence[str] = (), *, to_end: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """One forward pass of a block: the inputs of the tapped layers and the block's output (meaningless if not to_end).

    With `to_end` False the pass stops at the last tap.
    """
    caught: dict[str, Tensor] = {}

    def tap(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[path] = args[0]
            if not to_end and len(caught) == len(taps):
                raise _Reached

        return catch

    handles = [block.get_submodule(path).register_forward_pre_hook(tap(path)) for path in taps]
    output = hidden
    try:
        output = block(hidden, **arguments)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught, first_output(output)


def advance(block: nn.Module, stream: Stream) -> None:
    """Replace the stream's hidden states by the block's outputs."""
    for index, (hidden, arguments) in enumerate(zip(stream.hidden, stream.arguments, strict=True)):
        _, output = run_block(block, hidden, arguments)
        if not bool(torch.isfinite(output).all()):
            raise NumericalError(
                "a block's output holds NaN or infinity: look for damaged weights, or use --dtype float32"
            )
        stream.hidden[index] = output
    stream.past(stream.hidden)
