"""Windows that begin as the tokenizer begins a text: with BOS where it puts BOS before every text."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from optprune.errors import InputError
from optprune.texts import (
    DrawnWindows,
    Text,
    begin_tokens,
    calibration_batches,
    draw_windows,
    evaluation_windows,
    split_held_out,
    tokenise,
)
from tests.helpers.begun_tokenizer import begun_tokenizer
from tests.helpers.tiny_models import tiny_tokenizer

DOCUMENTS = [f"The minister said on day {number} that prices rose by {number} percent. " * 6 for number in range(40)]
TOKENIZER = begun_tokenizer()
BOS = TOKENIZER.bos_token_id


def drawn(sequences: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> DrawnWindows:
    return draw_windows(tokenizer, [Text("news", DOCUMENTS)], 9, 30, 2, sequences=sequences)


def test_the_tokens_are_those_that_the_tokenizer_puts_before_a_text() -> None:
    assert begin_tokens(TOKENIZER) == [BOS] == TOKENIZER("words")["input_ids"][:1]
    assert begin_tokens(begun_tokenizer("<s> </s> $A </s>")) == [BOS, TOKENIZER.eos_token_id]
    assert begin_tokens(begun_tokenizer("$A </s>")) == []
    assert tiny_tokenizer().bos_token_id == BOS and begin_tokens(tiny_tokenizer()) == []


def test_the_first_tokens_of_windows_are_replaced() -> None:
    tokens = torch.arange(23)
    assert evaluation_windows(tokens, 5, 3, [9]).tolist() == [[9, 1, 2, 3, 4], [9, 6, 7, 8, 9], [9, 11, 12, 13, 14]]
    assert evaluation_windows(tokens, 5, 2, [8, 9]).tolist() == [[8, 9, 2, 3, 4], [8, 9, 7, 8, 9]]
    plain = torch.cat(calibration_batches(tokens, 3, 6, 4))
    found = torch.cat(calibration_batches(tokens, 3, 6, 4, begin=[99]))
    assert torch.equal(found[:, 1:], plain[:, 1:]) and found[:, 0].tolist() == [99] * 3
    assert torch.equal(tokens, torch.arange(23)), "the tokens are not changed"


def test_a_window_needs_room_for_two_tokens_of_the_text() -> None:
    assert evaluation_windows(torch.arange(9), 3, 1, [7]).tolist() == [[7, 1, 2]]
    with pytest.raises(InputError, match="2 tokens have no room for the 1 that begin a text and two more: raise --seq"):
        evaluation_windows(torch.arange(9), 2, 1, [7])


def test_packed_windows_begin_with_bos_and_are_the_same_otherwise() -> None:
    """Whatever lies between the first and the last window, all tokens that are predicted are the same."""
    begun, plain = drawn("packed"), drawn("packed-no-bos")
    with_bos, without = torch.cat(begun.batches), torch.cat(plain.batches)
    assert (with_bos[:, 0] == BOS).all() and (without[:, 0] != BOS).sum() >= 8
    assert torch.equal(with_bos[:, 1:], without[:, 1:])
    assert begun.description == "news, 9 windows of 30 tokens, each begun with <s>, seed 2"
    assert plain.description == "news, 9 windows of 30 tokens, seed 2"


def test_whole_windows_have_the_bos_of_their_document() -> None:
    found = torch.cat(drawn("whole").batches)
    starts = [tokenise(TOKENIZER, [document], 30)[:30].tolist() for document in DOCUMENTS]
    assert all(window in starts for window in found.tolist()) and (found[:, 0] == BOS).all()
    assert drawn("whole").description.endswith("each from the start of a document, seed 2")


def test_a_tokenizer_that_puts_nothing_before_a_text_changes_no_window() -> None:
    one, other = drawn("packed", tiny_tokenizer()), drawn("packed-no-bos", tiny_tokenizer())
    assert torch.equal(torch.cat(one.batches), torch.cat(other.batches)) and one.description == other.description


def test_training_and_held_out_windows_begin_so_too() -> None:
    sizes = {"tokens": None, "most": 900, "seq_length": 30, "batch_size": 3, "held_out": 5, "seed": 0}

    def split(begin: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        found = split_held_out(DOCUMENTS, lambda some: tokenise(TOKENIZER, some), **sizes, begin=begin)  # type: ignore[arg-type]
        return torch.cat(found.batches), found.held_out

    for begun, plain in zip(split([BOS]), split([]), strict=True):
        assert (begun[:, 0] == BOS).all() and torch.equal(begun[:, 1:], plain[:, 1:])


def test_one_text_of_a_folder_with_a_saved_tokenizer(tmp_path: Path) -> None:
    """What a saved tokenizer puts before a text is known again."""
    TOKENIZER.save_pretrained(tmp_path)
    assert begin_tokens(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == [BOS]
