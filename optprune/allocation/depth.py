"""Depth: removal of whole attention and MLP sub-blocks by a score; the remaining weights do not change.

This is not a layer problem: removing a sub-block leaves nothing to solve. The result is an `Allocation` with zeros.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from optprune.allocation.allocation import Allocation, everything
from optprune.allocation.base import Allocator, DenseModel, Division
from optprune.calibration import calibrating, first_inputs
from optprune.calibration.divergence import Variants
from optprune.calibration.stream import forward_work, run_block, stream_bytes
from optprune.errors import InputError, NumericalError
from optprune.measure.evaluate import NAN_MESSAGE, TOKENS_AT_ONCE, negative_log_likelihood, perplexity_from_nll
from optprune.models import BlockShape, Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.report import PhaseAdvanced, RemovedPart
from optprune.report.phases import BUDGET
from optprune.work import Work


@dataclass(frozen=True)
class Candidate:
    """Group of sub-blocks of one block that are removed together."""

    block: int
    parts: tuple[str, ...]
    weights: int


@final
@dataclass(frozen=True)
class Depth(Allocator):
    """Allocator that removes sub-blocks, the lowest score first, until the budget is met as closely as possible.

    `perplexity` (2SSP) is that of the model without the sub-block. It is measured again after every removal, with about
    removals x candidates forward passes on `tokens` tokens. `influence` (ShortGPT) is the mean over tokens of
    1 - cos(h, h') with h, h' the hidden states before and after the sub-block, from one pass over all batches. Both are
    reconstructions: 2SSP removes attention only, ShortGPT whole layers.
    """

    sparsity: float
    parts: str
    """the sub-blocks that may be removed: attention, mlp, both (and recurrent mixers), or layers (all of a layer)"""
    score: str
    """the name of the score, perplexity or influence"""
    tokens: int

    def check(self, decoder: Decoder) -> None:
        return

    def work(self, shapes: Decoder, tokens: int) -> Work:
        states = stream_bytes(shapes, min(tokens, self.tokens))
        if self.score == "influence":
            # Each block is run twice, once without its MLP, with each of several mixers alone, and with nothing.
            mixers = max(len(set(shape.parts) - {"mlp"}) for shape in shapes.shapes())
            passes = forward_work(shapes, tokens, 2.0 + mixers * (mixers > 1) + shapes.architecture.stays)
            return Work(passes.flops, passes.bytes + stream_bytes(shapes, tokens), passes.passes)
        candidates = _candidates(shapes, self.parts)
        if not candidates:
            return Work()
        # A candidate costs half a pass on average, and the head.
        half = forward_work(shapes, min(tokens, self.tokens), 0.5)
        kept = 0 if shapes.store is not None else len(candidates) * states
        return Work(self._tried(shapes) * half.flops, half.bytes + states + kept)

    def step(self, shapes: Decoder) -> float:
        # The nearest sum is at most half of a sub-block away, unless all that may go are gone.
        return 0.5 * max((candidate.weights for candidate in _candidates(shapes, self.parts)), default=0)

    def head_tokens(self, shapes: Decoder, tokens: int) -> int:
        return min(tokens, self.tokens) * self._tried(shapes) if self.score == "perplexity" else 0

    def _tried(self, shapes: Decoder) -> int:
        """Return the number of candidates that are tried in all rounds, if they are removed in the model's order.

        Which ones go is not known. In this order all kinds of sub-blocks go, and at last those that still fit.
        """
        tried, left, blocks = 0, _candidates(shapes, self.parts), list(shapes.shapes())
        missing = self.sparsity * shapes.linear_weights()
        while able := _able(left, blocks, missing):
            tried += len(able)
            left.remove(able[0])
            blocks = _without(blocks, able[0])
            missing -= able[0].weights
        return tried

    def divide(self, dense: DenseModel) -> Division:
        decoder, on_event = dense.decoder, dense.on_event
        candidates = _candidates(decoder, self.parts)
        budget = self.sparsity * decoder.linear_weights()

        def scored(weights: int) -> None:
            on_event(PhaseAdvanced(BUDGET, "choosing sub-blocks to remove", "weight", weights, round(budget)))

        scored(0)
        influences = _influences(decoder, dense.batches, candidates) if self.score == "influence" else None
        windows = _windows(dense.batches, self.tokens)
        shapes = list(decoder.shapes())
        removed: list[tuple[Candidate, float]] = []
        weights = 0
        while True:
            able = _able(candidates, shapes, budget - weights)
            if not able:
                break
            before = [candidate for candidate, _ in removed]
            scores = influences or _perplexities(dense, able, windows, before)
            chosen = min(able, key=lambda candidate: scores[candidate])
            removed.append((chosen, scores[chosen]))
            candidates.remove(chosen)
            shapes = _without(shapes, chosen)
            weights += chosen.weights
            scored(weights)
        if not removed:
            least = min((candidate.weights for candidate in candidates), default=0)
            raise InputError(
                f"a sparsity of {self.sparsity:g} is less than half of the smallest sub-block to remove "
                f"({least} of {decoder.linear_weights()} weights): raise it"
            )
        whole = everything(decoder)
        blocks = (replace(block, shape=shape) for block, shape in zip(whole.blocks, shapes, strict=True))
        parts = (
            RemovedPart(candidate.block, part, _weights(decoder, candidate.block, part), score)
            for candidate, score in removed
            for part in candidate.parts
        )
        return Division(Allocation.of(decoder, blocks), removed=tuple(parts))


def _candidates(decoder: Decoder, which: str) -> list[Candidate]:
    candidates, needed = [], decoder.handed_on()
    for index, shape in enumerate(decoder.shapes()):
        there = tuple(part for part in shape.parts if part != "attention" or index not in needed)
        if which == "layers" and there != shape.parts:
            continue
        groups = [there] if which == "layers" else [(part,) for part in there if which in (part, "both")]
        for parts in groups:
            candidates.append(Candidate(index, parts, sum(_weights(decoder, index, part) for part in parts)))
    return candidates


def _able(candidates: Sequence[Candidate], shapes: Sequence[BlockShape], missing: float) -> list[Candidate]:
    """Return the candidates whose removal brings the sum closer to the budget, which is `missing` weights away.

    The last attention stays.
    """
    return [
        candidate
        for candidate in candidates
        if abs(missing - candidate.weights) < abs(missing)
        and any(shape.kv_heads for shape in _without(shapes, candidate))
    ]


def _weights(decoder: Decoder, block: int, part: str) -> int:
    shape = decoder.shape(block)
    return decoder.weights_of(shape) - decoder.weights_of(shape.without(part))


def _without(shapes: Sequence[BlockShape], candidate: Candidate) -> list[BlockShape]:
    result = list(shapes)
    for part in candidate.parts:
        result[candidate.block] = result[candidate.block].without(part)
    return result


def _windows(batches: Sequence[Tensor], tokens: int) -> Tensor:
    """Return the first windows of the first batch's length, up to a number of tokens; at least one."""
    length = batches[0].shape[1]
    rows = torch.cat([batch for batch in batches if batch.shape[1] == length])
    return rows[: max(1, tokens // length), :tokens]


def _perplexities(
    dense: DenseModel, candidates: Sequence[Candidate], windows: Tensor, removed: Sequence[Candidate]
) -> dict[Candidate, float]:
    """Return the perplexity without each candidate and without all that were removed before."""
    names = [f"{each.block} {' '.join(each.parts)}" for each in (*removed, *candidates)]
    found = dense.statistics.scores(
        ("perplexity", fingerprint(windows), len(removed), *names),
        lambda: _measured_perplexities(dense.decoder, candidates, windows, removed),
    )
    return dict(zip(candidates, found, strict=True))


def _measured_perplexities(
    decoder: Decoder, candidates: Sequence[Candidate], windows: Tensor, removed: Sequence[Candidate]
) -> list[float]:
    """Measure the perplexity without each candidate, in one pass of the blocks."""
    batches, tried = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])), list[Candidate]()
    with calibrating(decoder), decoder.without((each.block, part) for each in removed for part in each.parts):
        variants = Variants(decoder, batches)
        for index in range(len(decoder.blocks)):
            with decoder.resident(index):
                for candidate in (each for each in candidates if each.block == index):
                    with decoder.without((index, part) for part in candidate.parts):
                        variants.add()
                    tried.append(candidate)
                variants.advance()
        found = {each: _perplexity(decoder, batches, ends) for each, ends in zip(tried, variants.ends(), strict=True)}
    return [found[each] for each in candidates]


def _perplexity(decoder: Decoder, batches: Sequence[Tensor], ends: Sequence[Tensor]) -> float:
    """Return the perplexity of a model on windows, from the outputs of its last block."""
    total = 0.0
    for ids, hidden in zip(batches, ends, strict=True):
        total = negative_log_likelihood(ids.to(hidden.device), decoder.logits(hidden), total)
    if math.isnan(total):
        raise NumericalError(NAN_MESSAGE.format("the windows that choose what to remove"))
    return perplexity_from_nll(total, sum(ids[:, 1:].numel() for ids in batches))


def _influences(decoder: Decoder, batches: Sequence[Tensor], candidates: Sequence[Candidate]) -> dict[Candidate, float]:
    """Return 1 - cos of the hidden states before and after each candidate, the mean over tokens, from one pass."""
    stream = first_inputs(decoder, batches)
    sums = dict.fromkeys(candidates, 0.0)
    tokens, hidden = stream.hidden.tokens, int(decoder.model.config.hidden_size)
    for index, block in enumerate(decoder.blocks):
        shape = decoder.shape(index)
        # The sub-blocks that are gone where the states before a candidate are taken, and where those behind it are.
        others = {
            each: (_in_front(decoder, each, shape), _behind_or_beside(each, shape))
            for each in candidates
            if each.block == index
        }
        with decoder.resident(index):
            for batch, (before, arguments) in enumerate(zip(stream.hidden, stream.arguments, strict=True)):
                outputs = dict[tuple[str, ...] | None, Tensor]({None: before})
                for gone in dict.fromkeys(((), *(gone for pair in others.values() for gone in pair if gone))):
                    with decoder.without((index, part) for part in gone):
                        outputs[gone] = run_block(block, before, arguments)[1]
                for candidate, pair in others.items():
                    first, last = (outputs[gone][..., :hidden].double() for gone in pair)
                    cosine = torch.nn.functional.cosine_similarity(first, last, dim=-1)
                    sums[candidate] += float((1 - cosine).sum())
                stream.hidden[batch] = outputs[()]
        stream.past(stream.hidden)
    return {candidate: total / tokens for candidate, total in sums.items()}


def _in_front(decoder: Decoder, candidate: Candidate, shape: BlockShape) -> tuple[str, ...] | None:
    """Return the sub-blocks without which a block gives the states before a candidate; None for the block's inputs."""
    if candidate.parts == ("mlp",):
        return ("mlp",)
    return shape.parts if decoder.architecture.stays else None


def _behind_or_beside(candidate: Candidate, shape: BlockShape) -> tuple[str, ...]:
    """Return the sub-blocks of a block behind those of a candidate, or beside them: a second mixer."""
    return () if "mlp" in candidate.parts else tuple(part for part in shape.parts if part not in candidate.parts)
