"""Training text with held-out windows: whole documents, or the end of a single document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optprune.errors import InputError, check_at_least, check_count
from optprune.system.wording import counted
from optprune.texts.documents import Document, normalised_text
from optprune.texts.windows import batched, drawn_windows, evaluation_windows

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import LongTensor, Tensor

Tokenise = Callable[[Sequence[Document]], "Tensor"]
"""a function from documents to their tokens [tokens]"""


@dataclass(frozen=True)
class TrainingText:
    """Batches for training, and held-out windows of the same text."""

    batches: "list[LongTensor]"
    """the batches of training windows"""
    held_out: "LongTensor"
    """the windows [n, length] of other documents"""
    documents: int
    """the number of held-out documents; 0 for the end of a single document"""


def split_held_out(
    documents: Sequence[Document],
    tokenise: Tokenise,
    *,
    tokens: int | None,
    most: int,
    seq_length: int,
    batch_size: int,
    held_out: int,
    seed: int,
    worth: "Callable[[Tensor], Tensor] | None" = None,
    begin: Sequence[int] = (),
) -> TrainingText:
    """Split a text into training batches of `batch_size` windows, and `held_out` windows of other documents.

    Both are drawn by the seed. `tokens` is the number of training tokens: InputError where there are fewer; None means
    `most`, or all if there are fewer. A single document is held out at its end. `worth` returns a number for each of
    the tokens [n]: the training windows are then those with the largest sums. All windows begin with the ids `begin`:
    see `with_begin`.
    """
    import torch

    for option, value, least in (
        ("--tokens", tokens, seq_length),
        ("--batch-size", batch_size, 1),
        ("--held-out", held_out, 1),
        ("--seq-length", seq_length, 2),
    ):
        check_at_least(option, value, least)
    check_count("--seed", seed)
    wanted = held_out * seq_length
    # A repeated document could be trained on and held out.
    distinct = list({normalised_text(document): document for document in documents}.values())
    if len(distinct) == 1:
        found = tokenise(distinct)
        own, others, count = found[-wanted:], found[:-wanted], 0
    else:
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
        count = _enough([distinct[number] for number in order], tokenise, wanted)
        own = tokenise([distinct[number] for number in order[:count]])
        others = tokenise([distinct[number] for number in sorted(order[count:])])
    there = len(others) // seq_length
    least = 1 if tokens is None else tokens // seq_length
    if len(own) < wanted or there < least:
        raise InputError(
            f"beside {counted(held_out, 'held-out window')} the text has {counted(there, 'window')} of {seq_length} "
            f"tokens, fewer than the {least} needed: lower "
            f"{'--held-out or --seq-length' if tokens is None else '--tokens'}, "
            "or give a longer text"
        )
    samples = min(there, (most if tokens is None else tokens) // seq_length)
    worths = None if worth is None else worth(others)
    windows = drawn_windows(others, samples, seq_length, seed, worth=worths, begin=begin)
    batches = batched(windows, min(batch_size, samples) * seq_length)
    return TrainingText(batches, evaluation_windows(own, seq_length, held_out, begin), count)


def _enough(documents: Sequence[Document], tokenise: Tokenise, wanted: int) -> int:
    """Return the number of first documents with `wanted` tokens; at most all but one."""
    found = 0
    for count, document in enumerate(documents[:-1], start=1):
        found += len(tokenise([document]))
        if found >= wanted:
            return count
    return len(documents) - 1
