"""A tokenizer with fewer tokens writes any text, with the tokens that a text needs most."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from optprune.errors import InputError
from optprune.texts import demo_articles, tokenise
from optprune.tokens import SmallerVocabulary, choose_tokens
from optprune.tokens.token_models import MergedTokens
from optprune.tokens.tokenizer import weighted_counts
from tests.helpers.token_kinds import KINDS, tokenizer_of

ROWS = 1100
"""more than any of the tokenizers has"""
TEXTS = (
    "The committee met on Monday; 3 of its 12 members didn't vote.",
    "def f(x):\n\treturn [y**2 for y in x]  # squares\n",
    "委员会星期一开会,没有投票。",
    "Комитет заседал в понедельник.",
    "🙂👩‍👩‍👧‍👦 naïve café \u200b\u0301",
    "  many   spaces \n\n and\ttabs ",
    "<s> and <tool> inside</s>",
)
every_kind = pytest.mark.parametrize("kind", KINDS)
_smaller: dict[tuple[str, float], SmallerVocabulary] = {}


def chosen(tokenizer: Any, documents: list[str], keep: float, **more: Any) -> SmallerVocabulary:
    counts = weighted_counts([(tokenise(tokenizer, documents), 1.0)], more.pop("rows", ROWS))
    return choose_tokens(tokenizer, counts, keep, **more)


def smaller(kind: str, keep: float = 0.8) -> SmallerVocabulary:
    if (kind, keep) not in _smaller:
        _smaller[kind, keep] = chosen(tokenizer_of(kind), demo_articles("calibration")[:20], keep)
    return _smaller[kind, keep]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def both(vocabulary: SmallerVocabulary) -> tuple[Any, Any]:
    """The tokenizers before and after, whose base class declares little of what they do."""
    return vocabulary.before, vocabulary.tokenizer


def bytes_of(token: str) -> bytes:
    byte = re.fullmatch("<0x(..)>", token)
    return token.encode() if byte is None else bytes([int(byte[1], 16)])


def check_text(vocabulary: SmallerVocabulary, text: str) -> None:
    """A text is decoded as by the tokenizer before, which may itself not know a character."""
    before, after = both(vocabulary)
    found = after(text)["input_ids"]
    assert after.decode(found) == before.decode(before(text)["input_ids"])
    assert max(found) < len(vocabulary.kept)


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_written_as_before(kind: str, text: str) -> None:
    check_text(smaller(kind), text)
    if kind != "scored pieces":  # which has no bytes for characters that it does not know
        vocabulary = smaller(kind)
        assert vocabulary.tokenizer.decode(ids_of(vocabulary.tokenizer, text)) == text


@every_kind
@settings(max_examples=60)
@given(st.text(max_size=60))
def test_any_text_is_written_as_before(kind: str, text: str) -> None:
    check_text(smaller(kind), text)


def random_texts(count: int) -> Iterator[str]:
    """Strings of characters from all of Unicode but surrogates, and from its parts."""
    draw = random.Random(0)
    ranges = [(32, 127), (0, 0x250), (0x400, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    for _ in range(count):
        first, last = draw.choice(ranges)
        letters = (draw.randint(first, last) for _ in range(draw.randint(1, 24)))
        yield "".join(chr(letter) for letter in letters if not 0xD800 <= letter < 0xE000)


@pytest.mark.parametrize("kind", ["merged bytes", "merged pieces", "scored pieces and bytes"])
def test_ten_thousand_random_strings(kind: str) -> None:
    tokenizer = smaller(kind).tokenizer
    texts = list(random_texts(10_000))
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text


@every_kind
def test_all_tokens_give_the_same_ids(kind: str) -> None:
    vocabulary = smaller(kind, 1.0)
    for text in TEXTS:
        assert vocabulary.tokenizer(text)["input_ids"] == vocabulary.before(text)["input_ids"]


@every_kind
def test_every_token_that_stays_can_be_formed(kind: str) -> None:
    """Of a merge both parts stay, so that the text of a token is written by that token."""
    vocabulary = smaller(kind)
    tokenizer: Any = vocabulary.tokenizer
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in data["added_tokens"]} | {"<pad>", "<unk>"}
    model = tokenizer.backend_tokenizer.model
    names = [text for text in tokenizer.get_vocab() if text not in special and not text.startswith("<0x")]
    assert len(names) > 300
    assert [text for text in names if [token.value for token in model.tokenize(text)] != [text]] == []


@every_kind
def test_pieces_of_a_removed_token_are_its_text(kind: str) -> None:
    vocabulary = smaller(kind)
    before, after = both(vocabulary)
    removed = [old for old in vocabulary.pieces if old not in vocabulary.new_ids]
    assert len(removed) == len(before) - len(vocabulary.kept) > 50
    for old in removed:
        pieces = after.convert_ids_to_tokens(list(vocabulary.pieces[old]))
        assert b"".join(map(bytes_of, pieces)) == before.convert_ids_to_tokens(old).encode()
    for new, old in enumerate(vocabulary.kept):
        assert vocabulary.pieces[old] == (new,)
        assert after.convert_ids_to_tokens(new) == before.convert_ids_to_tokens(old)


@every_kind
def test_special_tokens_and_the_template_stay(kind: str) -> None:
    vocabulary = smaller(kind, 0.6)
    before, after = both(vocabulary)
    for name in ("bos_token", "eos_token", "unk_token", "chat_template", "model_max_length"):
        assert getattr(before, name) == getattr(after, name)
    assert after("x")["input_ids"][0] == after.bos_token_id
    assert "<tool>" in after.get_vocab()
    messages = [{"role": "user", "content": "Hello"}]
    again = after.apply_chat_template(messages, tokenize=False)
    assert again == before.apply_chat_template(messages, tokenize=False)
    assert after.bos_token_id in after.apply_chat_template(messages)["input_ids"]


def test_a_token_before_every_text_has_its_new_id() -> None:
    """As in Llama 3, whose special tokens are the last of the vocabulary."""
    tokenizer = tokenizer_of("merged bytes")
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    old = len(tokenizer) - 1
    rule = processors.TemplateProcessing("<begin> $A", "<begin> $A $B", [("<begin>", old)])
    tokenizer.backend_tokenizer.post_processor = rule
    vocabulary = chosen(tokenizer, demo_articles("calibration")[:20], 0.8)
    new = vocabulary.new_ids[old]
    assert new == len(vocabulary.kept) - 1 < old
    assert vocabulary.tokenizer("x")["input_ids"][0] == new == vocabulary.tokenizer.bos_token_id


def test_a_merged_token_needs_its_parts_whatever_the_order_of_merges() -> None:
    """The merge of "ab" with "c" comes before that of "a" with "b", and both tokens are needed equally."""
    vocab = {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}
    model = MergedTokens({"model": {"vocab": vocab, "merges": [["ab", "c"], ["a", "b"]]}})
    counts = np.array([0.0, 0, 0, 5, 0])
    assert model.choose(counts, 4, model.always()) == [0, 1, 2, 4]
    assert model.choose(counts, 5, model.always()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["merged bytes", "merged pieces"])
def test_merged_tokens_that_are_kept_write_a_text_with_the_fewest(kind: str) -> None:
    """A text has a token fewer for each merge; keeping the tokens that only occur most often leaves out their parts."""
    documents = demo_articles("calibration")[:20]
    vocabulary = smaller(kind)
    own = sum(len(ids_of(vocabulary.tokenizer, text)) for text in documents)
    draw = random.Random(1)
    for _ in range(3):
        # Leave out other tokens that no kept token is made of.
        other = chosen(vocabulary.before, [draw.choice(documents)], len(vocabulary.kept))
        assert own < sum(len(ids_of(other.tokenizer, text)) for text in documents)


def test_a_token_that_must_stay_stays() -> None:
    tokenizer = tokenizer_of("merged bytes")
    least = smaller("merged bytes", 0.6)
    removed = max(set(range(len(tokenizer))) - set(least.kept))
    found = chosen(tokenizer, ["text"], 0.6, also=[removed])
    assert removed in found.new_ids


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (100, "stay in any case"),
        (0, "cannot be 0"),
        (-0.5, "cannot be -0.5"),
        (300.5, "cannot be 300.5"),
        (5000, "larger than that of the model"),
    ],
)
def test_sizes_that_are_refused(keep: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen(tokenizer_of("merged bytes"), ["text"], keep)


def test_tokenizers_that_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(InputError, match="a WordLevel tokenizer cannot be pruned"):
        chosen(words, ["a"], 1)
    marked = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>"))
    with pytest.raises(InputError, match="marks parts of words"):
        chosen(PreTrainedTokenizerFast(tokenizer_object=marked), ["a"], 2)
    with pytest.raises(InputError, match="the tokenizer belongs to another model"):
        choose_tokens(tokenizer_of("merged bytes"), np.zeros(300), 0.9)
