"""The memory that tokenising a long text takes."""

import tracemalloc

import pytest
import torch

from optprune.texts import demo_articles, tokenise, windows
from tests.helpers.tiny_models import tiny_tokenizer

PROMISED = 16
"""bytes for each token of a long text, at the peak (docs/explanation/large.md)"""


def test_a_long_text_takes_sixteen_bytes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's objects by tracemalloc, and the ids in tensors, which it does not see: those of pieces and the joined.

    Pieces are smaller than usual, so that what a piece takes counts as little as in a text of millions of tokens.
    """
    monkeypatch.setattr(windows, "PIECE", 1 << 12)
    monkeypatch.setattr(windows, "CONTEXT", 1 << 8)
    tokenizer, held, joined = tiny_tokenizer(), [0, 0], torch.cat
    documents = demo_articles("calibration")[:120]
    make = torch.tensor

    def counted(*given, **named):
        made = make(*given, **named)
        held[0] += made.nbytes
        return made

    def peak(parts, *given):
        found = joined(parts, *given)
        held[1] = max(held[1], held[0] + found.nbytes)
        return found

    tokenise(tokenizer, documents[:2])
    monkeypatch.setattr(torch, "tensor", counted)
    monkeypatch.setattr(torch, "cat", peak)
    tracemalloc.start()
    try:
        found = tokenise(tokenizer, documents)
        objects = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tensors = max(held)
    assert found.dtype == torch.int32 and len(found) > 100_000
    assert tensors >= 4 * len(found), "the ids themselves"
    assert tensors + objects <= PROMISED * len(found)
