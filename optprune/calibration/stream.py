"""Streams: the hidden states between two blocks, and the passes that take them through a block."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.carried import CARRIED, Carried, carried, carried_width
from optprune.calibration.partial_sums import PartialSums, Share
from optprune.errors import InputError, NumericalError
from optprune.models import Decoder
from optprune.models.images import ADDED, with_added
from optprune.models.places import States
from optprune.numerics.fingerprint import fingerprint
from optprune.numerics.precision import full_precision
from optprune.numerics.tensors import first_output
from optprune.system.wording import counted
from optprune.work import Work

SLOW = 1.5
"""the time of an operation in a pass of tokens over that in a large matrix product, which is 1.45 on SmolLM2"""
TOKENS_PER_BATCH = 2048
"""the tokens of a calibration batch, about (texts/windows.py)"""

CONTEXT = 8
"""tokens of a context, by which a place in a text counts as one that was there before"""


@dataclass
class Stream:
    """Hidden states that enter the current block, one tensor a batch, with the other arguments of all blocks.

    What goes from block to block beside them stands in further columns (`carried`).

    Where processes share the batches, a stream holds those of this process.
    """

    hidden: States[Tensor]
    others: list[list[dict[str, Any]]]
    """the other arguments, by batch and block: blocks with a sliding window get another mask than the rest"""
    block: int = 0
    """the number of the current block"""
    share: Share = field(default_factory=Share)
    """the share of all batches that these are"""

    @property
    def arguments(self) -> list[dict[str, Any]]:
        """The other arguments of the current block, by batch."""
        return [blocks[self.block] for blocks in self.others]

    def copy(self) -> "Stream":
        """Return a second stream with the same hidden states."""
        return Stream(self.hidden[:], self.others, self.block, self.share)

    def with_hidden(self, hidden: Iterable[Tensor]) -> "Stream":
        """Return a second stream at the same block with other hidden states, which are read one at a time."""
        return Stream(self.hidden.with_values(hidden), self.others, self.block, self.share)

    def past(self, hidden: States[Tensor]) -> None:
        """Move on to the next block, whose inputs are these hidden states."""
        self.hidden, self.block = hidden, self.block + 1


class _Reached(Exception):  # control flow, not an error
    """Signal that ends a forward pass early."""


@contextmanager
def calibrating(decoder: Decoder) -> Iterator[None]:
    """Use evaluation mode, no gradients and no TF32 within the context; restore all of it afterwards."""
    modes = [(module, module.training) for module in decoder.model.modules()]
    decoder.model.eval()
    try:
        with torch.no_grad(), full_precision():
            yield
    finally:
        for module, training in modes:
            module.training = training


def held_out_count(count: int, share: float) -> int:
    """Return how many of `count` sequences a share holds out: at least one, where the share is not 0."""
    return max(1, round(share * count)) if share else 0


def hold_out(batches: list[Tensor], share: float) -> tuple[list[Tensor], int]:
    """Return the batches, cut so that the last ones hold a share of the sequences (at least one), and their number."""
    if not share:
        return batches, 0
    count = sum(len(batch) for batch in batches)
    apart = held_out_count(count, share)
    if apart >= count:
        raise InputError(
            f"held_out {share:g} of {count} calibration sequences leaves none for calibration: give more samples"
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
    """Return the first sequences of the batches, as many as hold `tokens`, or all."""
    taken: list[Tensor] = []
    for batch in batches:
        missing = tokens - sum(part.numel() for part in taken)
        if missing > 0:
            taken.append(batch[: -(-missing // batch.shape[1])])
    return taken


def repeated_text(batches: Sequence[Tensor], inputs: int) -> tuple[str, ...]:
    """Return a note where the text repeats itself, so that its tokens cannot vary in as many directions as `inputs`.

    A context is a token with the seven before it. Real text hardly repeats one; in a constant text, or one window again
    and again, all tokens are those of a few contexts, whatever the precision. The note is due where there are fewer
    contexts than inputs, and half as many as places in the text at most.
    """
    places, known = 0, torch.empty(0, dtype=torch.int64)
    factors = torch.randint(1 << 62, (CONTEXT,), generator=torch.Generator().manual_seed(0))
    for batch in batches:
        size = min(CONTEXT, batch.shape[1])
        # The sums wrap around, as those of a hash; two contexts have one sum with a chance of 2^-60 or so.
        sums = (batch.cpu().long().unfold(1, size, 1) * factors[:size]).sum(-1)
        places, known = places + sums.numel(), torch.cat([known, sums.flatten()]).unique()
        if len(known) >= inputs:
            return ()
    if 2 * len(known) > places:
        return ()
    return (
        f"the calibration text repeats itself: it has {counted(len(known), 'context')} of {CONTEXT} tokens, fewer than "
        f"the {inputs} inputs of a layer",
    )


def first_inputs(decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums | None = None) -> Stream:
    """Return the inputs of the first block for token batches [batch, length], with images where the decoder has some.

    With `partial_sums`, only this process's share of the batches is run. Where blocks have different kinds of
    attention, the first batch of each shape visits all blocks, without being computed, for their arguments.
    """
    if not batches:
        raise InputError("there are no calibration batches: give at least one tensor of token ids [batch, length]")
    share = Share() if partial_sums is None else partial_sums.share(len(batches))
    stream, count = Stream(States(decoder.states), [], share=share), len(decoder.blocks)
    kinds = getattr(decoder.model.config, "layer_types", None) or []
    beside = None if decoder.architecture.shared is None else carried(decoder)
    alike = len(set(kinds[:count])) < 2 and beside is None
    shared: dict[Hashable, list[dict[str, Any]]] = {}
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
            # Without padding, masks and positions depend on the shape, and on where images are if their masks differ.
            # One copy serves all batches of a form.
            form = decoder.form(batch)
            last = 1 if alike or (form in shared and not (beside and beside[0].argument)) else count
            with suppress(_Reached), _passing(decoder.blocks), decoder.embeddings_in_dtype():
                decoder.model(**decoder.inputs(batch.to(device)), use_cache=False)
            others = [arguments for _, arguments in caught]
            stream.hidden.append(_entering(caught[0][0], others, beside))
            if form not in shared:
                every = others * count if alike else others
                shared[form] = decoder.arguments(batch.to(device), caught[0][0], every)
            stream.others.append(shared[form])
    finally:
        for handle in handles:
            handle.remove()
    return stream


def _entering(hidden: Tensor, arguments: list[dict[str, Any]], beside: list[Carried] | None) -> Tensor:
    """Return the inputs of the first block with what they carry, which is removed from the arguments of each block."""
    if beside is None:
        return hidden
    first = beside[0]
    numbers = [each.pop(first.argument) for each in arguments] if first.argument else []
    for each, carries in zip(arguments, beside, strict=False):
        each.pop(first.shared)
        each[CARRIED] = carries
    return first.entering(hidden, numbers)


def call_block(block: nn.Module, states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return the outputs of a block for its inputs, with what they carry."""
    if ADDED in arguments:
        others = {name: value for name, value in arguments.items() if name != ADDED}
        return with_added(call_block(block, states, others), arguments[ADDED])
    carries: Carried | None = arguments.get(CARRIED)
    if carries is None:
        return first_output(block(states, **arguments))
    return carries.called(block, states, {name: value for name, value in arguments.items() if name != CARRIED})


def _named(block: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return by name the positional arguments of a block that follow the hidden states."""
    names = list(signature(type(block).forward).parameters)[1 : len(args) + 1]
    return dict(zip(names[1:], args[1:], strict=True))


@contextmanager
def _passing(blocks: nn.ModuleList) -> Iterator[None]:
    """Make the blocks return their inputs within the context."""
    before = [vars(block).pop("forward", None) for block in blocks]  # a user may have replaced it
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
    """Run a block once; return the inputs of the tapped layers and the block's output.

    Without `to_end` the pass stops at the last tap, and the output is meaningless.
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
        output = call_block(block, hidden, arguments)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught, output


def advance(
    block: nn.Module,
    stream: Stream,
    taps: Sequence[str] = (),
    on_inputs: Callable[[dict[str, Tensor]], None] = lambda inputs: None,
) -> None:
    """Replace the hidden states of a stream by the outputs of the block, and move on to the next block.

    `on_inputs` is called with the inputs of the tapped layers, by path, for each batch.
    """
    for index, (hidden, arguments) in enumerate(zip(stream.hidden, stream.arguments, strict=True)):
        inputs, output = run_block(block, hidden, arguments, taps)
        on_inputs(inputs)
        if not bool(torch.isfinite(output).all()):
            raise NumericalError(
                "a block's output holds NaN or infinity: look for damaged weights, or use --dtype float32"
            )
        stream.hidden[index] = output
    stream.past(stream.hidden)


# -- the work of a pass


def block_pass(decoder: Decoder, index: int) -> Work:
    """Return the work of one token in a forward pass of a block."""
    return Work(2 * SLOW * decoder.weights_of(decoder.shape(index)), passes=1.0)


def forward_work(decoder: Decoder, tokens: int, times: float = 1.0) -> Work:
    """Return the work of forward passes of all blocks, with the activations of the largest block for one batch."""
    kept = max(activation_bytes(decoder, index, min(tokens, TOKENS_PER_BATCH)) for index in range(len(decoder.blocks)))
    return Work(2 * SLOW * times * tokens * decoder.linear_weights(), kept, times)


def head_work(decoder: Decoder, tokens: int) -> Work:
    """Return the work of a forward pass of the head."""
    return Work(2 * SLOW * tokens * head_weights(decoder))


def head_weights(decoder: Decoder) -> int:
    """Return the number of weights of the head."""
    head = decoder.model.get_output_embeddings()
    return 0 if head is None else sum(weight.numel() for weight in head.parameters())


def activation_bytes(decoder: Decoder, index: int, tokens: int, *, backward: bool = False) -> int:
    """Return the memory of the activations inside a block for so many tokens; `backward` where all are kept."""
    hidden, width = decoder.model.config.hidden_size, decoder.shape(index).mlp_width
    # The residual, the norm, q, k, v and the output of attention; the gate, its activation, up, and their product.
    numbers = 14 * hidden + 8 * width if backward else max(7 * hidden, 3 * hidden + 3 * width)
    return tokens * numbers * itemsize(decoder)


def stream_bytes(decoder: Decoder, tokens: int) -> int:
    """Return the memory of the hidden states of so many tokens between two blocks."""
    return tokens * stream_width(decoder) * itemsize(decoder)


def stream_width(decoder: Decoder) -> int:
    """Return the most numbers of a token that go from a block to the next."""
    further = 0 if decoder.architecture.shared is None else carried_width(decoder)
    return int(decoder.model.config.hidden_size) + further


def itemsize(decoder: Decoder) -> int:
    """Return the bytes of a number in the dtype that the model computes in."""
    return (decoder.computes_in or decoder.model.dtype).itemsize


def calibration_facts(decoder: Decoder, batches: Sequence[Tensor]) -> dict[str, str]:
    """Return what decides the inputs of the first block, beside the model: the tokens, and the images among them."""
    images = {} if decoder.images is None else {"the calibration images": fingerprint(decoder.images.content)}
    return {"the calibration tokens": fingerprint(list(batches)), **images}
