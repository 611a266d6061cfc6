"""Training and held-out windows: no document and no token is in both."""

import pytest
import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.texts import TrainingText, split_held_out

DOCUMENTS = [chr(ord("a") + number) * (20 + number) for number in range(20)]


def by_letters(documents: list[str]) -> Tensor:
    return torch.tensor([ord(letter) for document in documents for letter in document], dtype=torch.int32)


def cut(documents: list[str] = DOCUMENTS, **options: object) -> TrainingText:
    sizes = {"tokens": None, "most": 200, "seq_length": 8, "batch_size": 3, "held_out": 6, "seed": 0}
    return split_held_out(documents, by_letters, **{**sizes, **options})  # type: ignore[arg-type]


def test_documents_are_on_one_side_only() -> None:
    found = cut([*DOCUMENTS, *DOCUMENTS])  # some people's texts hold an article twice
    trained = torch.cat(found.batches)
    assert [tuple(batch.shape) for batch in found.batches] == [(3, 8)] * 8 + [(1, 8)]
    assert found.held_out.shape == (6, 8) and found.held_out.dtype == torch.int64
    assert not set(trained.unique().tolist()) & set(found.held_out.unique().tolist())
    assert found.documents == len(found.held_out.unique()) >= 2


def test_the_seed_draws_both() -> None:
    one, again, other = cut(), cut(), cut(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.batches, again.batches, strict=True))
    assert not torch.equal(one.held_out, other.held_out)


def test_windows_of_most_worth_are_trained_on_where_tokens_have_a_worth() -> None:
    rare = ord("t")
    found = cut(worth=lambda tokens: (tokens == rare).long(), most=24, held_out=1)
    counts = [int((window == rare).sum()) for window in torch.cat(found.batches)]
    everything = cut(most=10_000, held_out=1)
    assert sorted(counts) == sorted(int((window == rare).sum()) for window in torch.cat(everything.batches))[-3:]
    assert min(counts) > 0 and torch.equal(found.held_out, everything.held_out)
    plain = cut(held_out=1)
    equal = cut(worth=lambda tokens: torch.zeros(len(tokens)), held_out=1)
    assert torch.equal(torch.cat(equal.batches), torch.cat(plain.batches)), "equal windows are drawn at random"


def test_the_end_of_a_single_document_is_held_out() -> None:
    document = "".join(chr(0x100 + number) for number in range(300))
    found = cut([document], tokens=80)
    assert found.held_out.flatten().tolist() == [ord(letter) for letter in document[-48:]]
    assert torch.cat(found.batches).max() < ord(document[-48])
    assert sum(batch.numel() for batch in found.batches) == 80 and found.documents == 0


def test_a_batch_may_be_larger_than_the_text() -> None:
    assert [len(batch) for batch in cut(batch_size=1 << 63).batches] == [len(torch.cat(cut().batches))]


def test_no_more_documents_are_held_out_than_it_takes() -> None:
    """Of documents with three windows each, six windows are two documents, and the others are trained on."""
    found = cut([chr(ord("a") + number) * 24 for number in range(5)])
    assert found.documents == len(found.held_out.unique()) == 2
    assert len(torch.cat(found.batches).unique()) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": 4}, "--tokens cannot be 4: it is at least 8"),
        ({"seq_length": 1}, "--seq-length cannot be 1"),
        ({"seed": 2**63}, "--seed cannot be 9223372036854775808: give a smaller number"),
        (
            {"tokens": 1000},
            r"the text has \d+ windows of 8 tokens, fewer than the 125 needed: lower --tokens, or give a longer",
        ),
        ({"held_out": 100}, "beside 100 held-out windows the text has .* lower --held-out or --seq-length"),
    ],
)
def test_what_the_text_is_too_short_for(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        cut(**options)
