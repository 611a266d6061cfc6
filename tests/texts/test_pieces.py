"""Tokens of a text in pieces equal those of the whole text, for any text and tokenizer."""

import functools
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optprune.texts import demo_articles, tokenise, windows
from optprune.texts.windows import CannotSplit, token_pieces
from tests.helpers.tiny_models import tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(model: models.Model, *, split: bool = True, bytes_too: bool = True) -> PreTrainedTokenizerFast:
    """In the manner of Llama's: spaces are symbols of their own, nothing splits the text, unknown letters are bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if split:  # while it learns, so that no token reaches into the next word
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256 if bytes_too else 0))]
    texts = [text for article in demo_articles("calibration")[:12] for text in article.split("\n")]
    if isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=known, unk_token="<unk>")
    else:
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=known, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteFallback()
    template = processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte pairs": tiny_tokenizer,
    "as Llama's": lambda: trained(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)),
    "a unigram": lambda: trained(models.Unigram(), bytes_too=False),
    "over words": lambda: trained(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True), split=False),
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return MAKERS[name]()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "PIECE", 300)
    monkeypatch.setattr(windows, "CONTEXT", 100)


WORDS = st.sampled_from(
    [
        "the",
        "market",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "1234567",
        "3.14",
        "</s>",
        "<s>",
        "…",
        "Zürich",
        "e\u0301",
        "日本",
        "🎉",
    ]
)
RUNS = st.builds(
    lambda text, times: text * times, st.sampled_from([" ", "\n", "a", "7", "ab", "-", "é"]), st.integers(1, 700)
)
TEXTS = st.lists(st.one_of(WORDS, RUNS, st.text(max_size=20)), min_size=1, max_size=60)


@pytest.mark.parametrize("name", MAKERS)
@given(documents=st.lists(TEXTS.map(" ".join), min_size=1, max_size=3), joined=st.booleans())
def test_the_tokens_are_those_of_the_whole_text(name: str, documents: list[str], joined: bool) -> None:
    documents = [text.encode(errors="ignore").decode() for text in documents]
    documents = ["".join(documents)] if joined else documents
    tokenizer = tokenizer_of(name)
    assert tokenise(tokenizer, documents).tolist() == tokenizer("\n\n".join(documents))["input_ids"]


@pytest.mark.parametrize("name", MAKERS)
def test_prose_is_cut(name: str) -> None:
    articles = demo_articles("evaluation")[:20]
    text = "\n\n".join(articles)
    tokenizer = tokenizer_of(name)
    found = list(token_pieces(tokenizer, articles))
    assert len(found) > len(text) / 450
    assert [token for ids in found for token in ids] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["byte pairs", "as Llama's"])
def test_no_more_is_tokenised_than_is_needed(name: str) -> None:
    tokenizer, documents = tokenizer_of(name), demo_articles("evaluation")[:20]
    whole = tokenise(tokenizer, documents)
    part = tokenise(tokenizer, documents, 500)
    assert 500 <= len(part) < 900
    assert part.tolist() == whole[: len(part)].tolist()
    assert tokenise(tokenizer, documents, 10**9).tolist() == whole.tolist()
    assert tokenise(tokenizer, iter(documents)).tolist() == whole.tolist()


def digits_by_three() -> PreTrainedTokenizerFast:
    """Digits in groups of three from the first of them on, as Llama 3 splits them, with the tokens 12, 34 and 56."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\D+"), "isolated")
    trainer = trainers.BpeTrainer(initial_alphabet=list("123456ab "), show_progress=False)
    tokenizer.train_from_iterator(["12 34 56 12 34 56"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_split_that_counts_from_far_away_is_noticed() -> None:
    """In the middle of a long number no token reaches from 2 to 3, but the next piece would count from elsewhere."""
    tokenizer, text = digits_by_three(), "a b " + "123456" * 300
    assert tokenizer.tokenize("123456" * 2) == ["12", "3", "4", "56"] * 2
    assert tokenise(tokenizer, [text]).tolist() == tokenizer(text)["input_ids"]
    with pytest.raises(CannotSplit):
        list(token_pieces(tokenizer, [text]))


@pytest.mark.parametrize("name", MAKERS)
def test_no_token_could_reach_over_a_cut(name: str) -> None:
    tokenizer = tokenizer_of(name)
    found = list(token_pieces(tokenizer, demo_articles("evaluation")[:10]))[1:]
    for left, right in pairwise(found):
        meeting = "".join(tokenizer.convert_ids_to_tokens([left[-1], right[0]]))
        place = len(tokenizer.convert_ids_to_tokens(left[-1]))
        across = meeting[place - 1 : place + 1]
        assert not [token for token in tokenizer.get_vocab() if across in token]
