"""The Fisher information of every layer's outputs, by a backward pass that goes through the model block by block.

At most the block inputs of one group of sequences, the activations of one block and the logits of a few positions are
in memory. The metrics of all layers are complete at the end, on the model's device and in its dtype: diagonals are
small, whole matrices take 2 out^2 bytes a layer in float32. A model in half precision is computed in float32, and its
metrics are those of the same weights in float32, bit for bit.

Where blocks are read from files, all groups go through the model in one sweep forward and one backward, so that each
block is read twice. The inputs of the blocks and the metrics are then kept in files.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optprune.calibration.partial_sums import OrderedSum, PartialSums, Share
from optprune.calibration.stream import (
    SLOW,
    activation_bytes,
    block_pass,
    calibrating,
    call_block,
    first_inputs,
    head_work,
    itemsize,
    run_block,
    stream_bytes,
)
from optprune.errors import InputError, NumericalError
from optprune.measure.memory import release
from optprune.metric import Metrics, MetricSums, clipped
from optprune.models import Decoder
from optprune.models.places import States
from optprune.work import Work

TOKENS_AT_ONCE = 512
"""the tokens that go through the blocks together"""
POSITIONS_AT_ONCE = 128
"""the tokens that go through the head together: the logits of a large vocabulary would be the largest tensors"""
PASSES_BACK = 3
"""the backward pass of a block in forward passes, roughly: forward again, back, and the products of gradients"""
NO_LABEL = -100
"""the label of a position without a prediction"""

Labels = Callable[[Tensor, Tensor], Tensor]
"""a function from logits [positions, vocabulary] and the text's next tokens [positions] to labels, some NO_LABEL"""


def sampled(seed: int, before: int = 0) -> Labels:
    """Return labels drawn from the model's own predictions at every position: the true Fisher information.

    The labels of the first `before` positions are skipped: another process draws them.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.rand(before, generator=generator, dtype=torch.float64)

    def draw(logits: Tensor, _: Tensor) -> Tensor:
        # By inversion with one number a position, so that a seed means the same on every device and in any grouping.
        chance = torch.rand(len(logits), generator=generator, dtype=torch.float64).to(logits.device)
        total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        # The label at which the cumulated probability passes the number in [0, 1).
        drawn = torch.searchsorted(total, (chance * total[:, -1])[:, None], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)

    return draw


def from_text(_: Tensor, following: Tensor) -> Tensor:
    """Return the text's own next tokens: the empirical Fisher information, for comparison."""
    return following


def next_tokens(ids: Tensor) -> Tensor:
    """Return the id after each position of ids [batch, length]; NO_LABEL at the end of a sequence."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NO_LABEL)], dim=1)


def collect_metrics(
    decoder: Decoder,
    batches: Iterable[Tensor],
    labels: Labels,
    *,
    full: Collection[str] = (),
    widest: float = math.inf,
    clip: float | None = None,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
    partial_sums: PartialSums | None = None,
) -> Metrics:
    """Return the output metric of every linear layer of the decoder blocks, by the layer's full name, not damped.

    `batches` are token ids [batch, length] without padding. g is the gradient of the negative log-likelihood, summed
    over the predictions of a sequence; E[g g^T] is the average over all its tokens. Layers whose path within a block
    is in `full` get a matrix, if they have at most `widest` outputs; all others get its diagonal. Gradients of single
    tokens are shortened to `clip` medians (see `clipped`). The model does not change. `on_pass` is called with the
    number of block passes done and with their total; a backward pass counts as several. The sums are added in
    `partial_sums` over groups of sequences, of which this process runs its own; `positions_before` says where its
    labels begin.
    """
    unknown = set(full) - set(decoder.architecture.layers)
    if unknown:
        known = ", ".join(decoder.architecture.layers)
        raise InputError(f"a block has no linear layers {sorted(unknown)}: name some of {known}")
    decoder = decoder.precise()
    groups = list(_groups(batches))
    if not groups:
        raise InputError("there are no batches for the output metric: give at least one tensor of ids [batch, length]")
    share = (partial_sums or PartialSums()).share(len(groups))
    groups, sums = share.of(groups), _LayerSums(decoder, full, widest, clip, share)
    # The sums of a layer grow group by group in both cases, so they are the same.
    together = 1 if decoder.store is None else max(1, len(groups))
    sweeps, done = range(0, len(groups), together), 0

    def passed(more: int) -> None:
        nonlocal done
        done += more
        on_pass(done, len(sweeps) * len(decoder.blocks) * (1 + PASSES_BACK))

    with calibrating(decoder):
        passed(0)
        for first in sweeps:
            sweep, add = groups[first : first + together], partial(sums.add, first)
            for index in _sweep(decoder, sweep, labels, add, lambda: passed(1)):
                passed(PASSES_BACK)
                if first == sweeps[-1]:
                    sums.finish(index)
            release()
        return sums.metrics()


class _LayerSums:
    """The partial sums of all layers."""

    def __init__(
        self, decoder: Decoder, full: Collection[str], widest: float, clip: float | None, share: Share
    ) -> None:
        self._decoder, self._clip, self._share, self._names = decoder, clip, share, list[str]()
        self._sums: dict[str, OrderedSum[MetricSums]] = {}
        self._done: dict[str, MetricSums] = {}
        for index in range(len(decoder.blocks)):
            for path in decoder.paths(index):
                layer = decoder.layer(index, path)
                dtype = decoder.computes_in or layer.weight.dtype
                like = torch.empty(0, dtype=dtype, device=decoder.model.device)
                whole = path in full and layer.out_features <= widest
                fresh = partial(MetricSums, layer.out_features, like, full=whole)
                self._names.append(decoder.name(index, path))
                self._sums[self._names[-1]] = OrderedSum(share.partial_sums, fresh)

    def add(self, first: int, index: int, path: str, group: int, gradients: Tensor) -> None:
        """Add the gradients of the `group`-th group after the `first` of its sweep."""
        sums = self._sums[self._decoder.name(index, path)].at(self._share.part(first + group))
        sums.add(clipped(gradients, self._clip))

    def finish(self, index: int) -> None:
        """Add up the partial sums of a block, which is complete."""
        decoder = self._decoder
        for name in (decoder.name(index, path) for path in decoder.paths(index)):
            self._done[name] = self._sums.pop(name).total()
            self._done[name].move(decoder.offload.keep_all)

    def metrics(self) -> Metrics:
        """Return the metrics of all blocks. A process without batches adds them up only now."""
        if not self._done:
            for index in reversed(range(len(self._decoder.blocks))):
                self.finish(index)
        return Metrics({name: self._done[name] for name in self._names})


def positions_before(batches: Iterable[Tensor], partial_sums: PartialSums) -> int:
    """Return the number of positions of the batches before those of this process."""
    groups = list(_groups(batches))
    return sum(ids.numel() for ids in groups[: partial_sums.share(len(groups)).before])


def _groups(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(max(1, TOKENS_AT_ONCE // batch.shape[1]))


def _sweep(
    decoder: Decoder,
    groups: list[Tensor],
    labels: Labels,
    add: Callable[[int, str, int, Tensor], None],
    on_forward: Callable[[], None],
) -> Iterator[int]:
    """Run some groups of sequences forward and backward through all blocks; yield each finished block, last first.

    `add` is called with the gradients at the outputs of a block's layers: block, path, group, gradients. `on_forward`
    is called after each block of the forward sweep.
    """
    stream, entries = first_inputs(decoder, groups), list[States[Tensor]]()
    for index in range(len(decoder.blocks)):
        entries.append(stream.hidden.to(decoder.offload))
        with decoder.resident(index) as block:
            pairs = zip(stream.hidden, stream.arguments, strict=True)
            stream.past(
                stream.hidden.with_values(run_block(block, hidden, arguments)[1] for hidden, arguments in pairs)
            )
        on_forward()
    gradients = stream.hidden.with_values(())
    with decoder.head_in_dtype():
        for ids, hidden in zip(groups, stream.hidden, strict=True):
            slope = head_gradient(decoder, hidden, labels, next_tokens(ids.to(hidden.device)))
            if not bool(torch.isfinite(slope).all()):
                raise NumericalError("the gradient of the model's loss holds NaN or infinity: look for damaged weights")
            gradients.append(slope)
    stream.hidden = stream.hidden.with_values(())
    for index in reversed(range(len(decoder.blocks))):
        # Popped, so that the inputs of finished blocks are freed.
        entry = entries.pop()
        stream.block = index
        with decoder.resident(index):
            for group, arguments in enumerate(stream.arguments):
                found, gradients[group] = _backward(decoder, index, entry[group], arguments, gradients[group])
                for path, gradient in found.items():
                    add(index, path, group, gradient)
        yield index


def head_gradient(decoder: Decoder, hidden: Tensor, labels: Labels, following: Tensor) -> Tensor:
    """Return the gradient of the summed negative log-likelihood after the last block, a few positions at a time."""
    slope = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    parts = (tensor.flatten(0, 1).split(POSITIONS_AT_ONCE) for tensor in (hidden, slope, following))
    for position, found, text in zip(*parts, strict=True):
        entry = position.detach().requires_grad_()
        with torch.enable_grad():
            logits = decoder.logits(entry)
        drawn = labels(logits.detach(), text)
        drawn = drawn.masked_fill(text >= logits.shape[-1], NO_LABEL)  # an image is not predicted
        found.copy_(torch.autograd.grad(logits, entry, _error(logits.detach(), drawn))[0])
    return slope


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed negative log-likelihood at the logits [positions, vocabulary]: p - e_label."""
    error = logits.softmax(-1)
    counts = labels != NO_LABEL
    error.scatter_add_(-1, labels.where(counts, 0)[:, None], error.new_full((), -1.0).expand(len(labels), 1))
    return error.mul_(counts[:, None])


def _backward(
    decoder: Decoder, index: int, hidden: Tensor, arguments: dict[str, Any], gradient: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients at the outputs of a block's linear layers, by path, and at the block's input."""
    paths = decoder.paths(index)
    outputs: dict[str, Tensor] = {}

    def tap(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def catch(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            outputs[path] = output

        return catch

    block = decoder.blocks[index]
    handles = [block.get_submodule(path).register_forward_hook(tap(path)) for path in paths]
    try:
        with torch.enable_grad():
            entry = hidden.detach().requires_grad_()
            after = call_block(block, entry, arguments)
        # Only these tensors get gradients, whatever parameters require.
        found = torch.autograd.grad(after, [entry, *(outputs[path] for path in paths)], gradient)
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(paths, found[1:], strict=True)), found[0]


# -- the work of the pass


def block_work(decoder: Decoder, index: int, *, full: Collection[str] = (), widest: float = math.inf) -> Work:
    """Return the work of one token in a block: forward, backward, and the products of whole metrics."""
    squares = sum(count**2 for count in _whole(decoder, index, full, widest))
    return block_pass(decoder, index) * (1 + PASSES_BACK) + Work(2 * SLOW * squares)


def work(decoder: Decoder, tokens: int, *, full: Collection[str] = (), widest: float = math.inf) -> Work:
    """Return the work of `collect_metrics` on so many tokens, with the memory of all sums."""
    blocks = range(len(decoder.blocks))
    flops = tokens * sum(block_work(decoder, index, full=full, widest=widest).flops for index in blocks)
    group = min(tokens, TOKENS_AT_ONCE)
    inside = max(activation_bytes(decoder, index, group, backward=True) for index in blocks)
    # The logits and their softmax; in float64 its cumulated sums and their input.
    head = POSITIONS_AT_ONCE * decoder.model.config.vocab_size * (2 * itemsize(decoder) + 16)
    sums = sum(metric_bytes(decoder, index, full=full, widest=widest) for index in blocks)
    entries = (len(blocks) + 2) * stream_bytes(decoder, group)
    if decoder.store is not None:
        # The sums and the inputs of blocks are in files; all groups are under way together.
        sums = max(metric_bytes(decoder, index, full=full, widest=widest) for index in blocks)
        entries = 2 * stream_bytes(decoder, tokens)
    passes = Work(flops, sums + entries + max(head, inside), 1.0 + PASSES_BACK)
    return passes + head_work(decoder, tokens) * 3


def metric_bytes(decoder: Decoder, index: int, *, full: Collection[str], widest: float = math.inf) -> int:
    """Return the memory of the sums of a block's whole metrics: half of each matrix. Diagonals are not counted."""
    return sum(count**2 * itemsize(decoder) // 2 for count in _whole(decoder, index, full, widest))


def _whole(decoder: Decoder, index: int, full: Collection[str], widest: float) -> list[int]:
    """Return the outputs of the layers of a block whose metric is a whole matrix."""
    outputs = [decoder.layer(index, path).out_features for path in decoder.paths(index) if path in full]
    return [count for count in outputs if count <= widest]
