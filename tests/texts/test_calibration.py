"""Calibration windows: shares of texts, and windows packed or at the start of documents."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.texts import Conversation, DrawnWindows, Text, calibration_batches, draw_windows, read_texts, tokenise
from optprune.texts import calibration as module
from optprune.texts.calibration import divide_by_shares, interleave, read_shares
from tests.helpers.numbers_tokenizer import TEMPLATE, counted, numbers_tokenizer
from tests.helpers.tiny_models import tiny_tokenizer

SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=6).map(
    lambda parts: [Fraction(part, sum(parts)) for part in parts]
)


def named(spec: str) -> list[tuple[str, float]]:
    return [(text.name, float(text.share)) for text in read_shares(spec)]


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("a.jsonl:text=0.7,b.txt=0.3", [("a.jsonl:text", 0.7), ("b.txt", 0.3)]),
        ("hf:a/b:en:train[:9]=.25,demo:speeches=.75", [("hf:a/b:en:train[:9]", 1 / 4), ("demo:speeches", 3 / 4)]),
        ("a,b=c.txt=0.5,x=y:z=0.5", [("a,b=c.txt", 0.5), ("x=y:z", 0.5)]),
        ("a.csv:share=1=1", [("a.csv:share=1", 1.0)]),
        ("a.txt=0.33,b.txt=0.33,c.txt=0.33", [("a.txt", 0.33), ("b.txt", 0.33), ("c.txt", 0.33)]),
        ("a.txt=1", [("a.txt", 1.0)]),
        ("a.txt", [("a.txt", 1.0)]),
        ("a=b,c=d.txt", [("a=b,c=d.txt", 1.0)]),
        ("", [("", 1.0)]),
    ],
)  # fmt: skip
def test_texts_and_their_shares(spec: str, texts: list[tuple[str, float]]) -> None:
    assert named(spec) == texts


def test_what_is_there_is_one_text_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a.txt=0.5,b.txt=0.5"
    assert len(read_shares(name)) == 2
    Path(name).write_text("words")
    assert named(name) == [(name, 1.0)]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("a.txt=0.7,b.txt=0.2", r"are 0\.7 \+ 0\.2, with the sum 0\.9: give shares above 0 with the sum 1"),
        ("a.txt=0.7,b.txt=0.4", "with the sum 1.1"),
        ("a.txt=70,b.txt=30", "with the sum 100"),
        ("a.txt=1,b.txt=0", r"are 1 \+ 0, "),
        ("a.txt=0.5", "with the sum 0.5"),
        ("a.txt=0.5,b.txt", r"the text 'b\.txt' of the calibration has no share"),
        ("a.txt=0.5,b.txt=half", r"'b\.txt=half' of the calibration has no share"),
        ("a.txt=0.5,a.txt=0.5", r"the text a\.txt is given twice"),
    ],
)
def test_shares_that_are_none(spec: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_shares(spec)


@given(shares=SHARES, samples=st.integers(0, 400))
def test_windows_are_divided_by_largest_remainders(shares: list[Fraction], samples: int) -> None:
    counts = divide_by_shares(samples, shares)
    assert sum(counts) == samples
    exact = [samples * share for share in shares]
    assert all(abs(count - due) < 1 for count, due in zip(counts, exact, strict=True))
    up = [due % 1 for count, due in zip(counts, exact, strict=True) if count > due]
    down = [due % 1 for count, due in zip(counts, exact, strict=True) if count < due]
    assert not up or not down or min(up) >= max(down)


def test_of_equal_remainders_the_first_text_has_precedence() -> None:
    assert divide_by_shares(3, [Fraction(1, 2), Fraction(1, 2)]) == (2, 1)
    assert divide_by_shares(10, [Fraction(33, 100)] * 3) == (4, 3, 3)  # shares that were rounded count as thirds


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_the_order_has_every_window_once_and_is_even(counts: list[int]) -> None:
    order = interleave(counts)
    assert sorted(order) == [(text, number) for text, count in enumerate(counts) for number in range(count)]
    for text, count in enumerate(counts):
        assert [number for other, number in order if other == text] == list(range(count))
        share = count / max(1, sum(counts))
        for most in range(len(order) + 1):
            found = sum(other == text for other, _ in order[:most])
            # Half a window for this text, and half a window of each for how far the order has come.
            assert abs(found - most * share) <= 0.5 + share * len(counts) / 2 + 1e-9


FAR = 1200
"""how far the numbers of one text are from those of the next"""


def numbered(lengths: Sequence[Sequence[int]], shares: Sequence[float]) -> list[Text]:
    """Texts of documents of so many consecutive numbers: a document begins where the one before it ends."""
    texts = []
    for place, (some, share) in enumerate(zip(lengths, shares, strict=True)):
        begins = [FAR * place, *(FAR * place + end for end in accumulate(some))]
        documents = [counted(first, length) for first, length in zip(begins, some, strict=False)]
        texts.append(Text(f"text {place}", documents, share))
    return texts


def windows(drawn: DrawnWindows) -> torch.Tensor:
    return torch.cat(drawn.batches)


def draw(texts: list[Text], samples: int, length: int, seed: int, sequences: str = "packed") -> DrawnWindows:
    return draw_windows(numbers_tokenizer(), texts, samples, length, seed, sequences=sequences)


LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=12, max_size=25), min_size=1, max_size=4)


@given(lengths=LENGTHS, length=st.integers(2, 6), samples=st.integers(4, 8), seed=st.integers(0, 2**32))
def test_packed_windows_are_pieces_of_their_texts_that_do_not_overlap(
    lengths: list[list[int]], length: int, samples: int, seed: int
) -> None:
    texts = numbered(lengths, [1 / len(lengths)] * len(lengths))
    assume(all(sum(some) >= length * samples for some in lengths))
    drawn = draw(texts, samples, length, seed)
    found = windows(drawn)
    assert found.shape == (samples, length)
    assert torch.equal(found, found[:, :1] + torch.arange(length))  # pieces of a text, in its order
    assert found.unique().numel() == found.numel()  # nothing twice
    of_text = [int(window[0]) // FAR for window in found]
    assert drawn.counts == tuple(of_text.count(place) for place in range(len(texts)))
    for place, (text, count) in enumerate(zip(texts, drawn.counts, strict=True)):
        own = found[[of == place for of in of_text]]
        assert int(own.max()) < FAR * place + sum(lengths[place])
        alone = calibration_batches(tokenise(numbers_tokenizer(), text.documents), count, length, seed)
        assert torch.equal(own, torch.cat(alone))
    assert torch.equal(found, windows(draw(texts, samples, length, seed)))
    assert torch.equal(drawn.first, torch.arange(length))


@given(lengths=LENGTHS, length=st.integers(2, 12), samples=st.integers(4, 8), seed=st.integers(0, 2**32))
def test_whole_windows_begin_where_documents_do_and_cross_none(
    lengths: list[list[int]], length: int, samples: int, seed: int
) -> None:
    texts = numbered(lengths, [1 / len(lengths)] * len(lengths))
    begins = [
        {FAR * place + end - size for end, size in zip(accumulate(some), some, strict=True) if size >= length}
        for place, some in enumerate(lengths)
    ]
    assume(all(len(some) >= samples for some in begins))
    drawn = draw(texts, samples, length, seed, "whole")
    found = windows(drawn)
    assert torch.equal(found, found[:, :1] + torch.arange(length))
    firsts = found[:, 0].tolist()
    assert len(set(firsts)) == samples
    assert set(firsts) <= set().union(*begins)
    assert drawn.counts == tuple(sum(first in some for first in firsts) for some in begins)
    assert torch.equal(found, windows(draw(texts, samples, length, seed, "whole")))


def test_every_document_that_is_long_enough_has_its_chance() -> None:
    texts = numbered([[3, 9, 9, 2, 9, 9]], [1])
    firsts = [tuple(windows(draw(texts, 2, 4, seed, "whole"))[:, 0].tolist()) for seed in range(40)]
    assert {first for pair in firsts for first in pair} == {3, 12, 23, 32}
    assert len(set(firsts)) > 4  # by the seed, in any order


def test_no_more_documents_are_tokenised_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(tokenizer, documents, most=None):
        asked.append((len(documents), most))
        return tokenise(tokenizer, documents, most)

    monkeypatch.setattr(module, "tokenise", counting)
    draw(numbered([[9] * 50], [1]), 5, 4, 0, "whole")
    assert asked == [(1, 4)] * 5


def test_two_texts_are_spread_over_the_batches() -> None:
    texts = numbered([[200], [200]], [0.75, 0.25])
    drawn = draw_windows(numbers_tokenizer(), texts, 8, 10, 0, tokens_per_batch=20)
    assert drawn.counts == (6, 2)
    assert [batch.shape for batch in drawn.batches] == [(2, 10)] * 4
    of_text = [int(window[0]) // FAR for window in windows(drawn)]
    assert sum(of_text[:4]) == sum(of_text[4:]) == 1


def test_one_text_is_drawn_as_it_always_was() -> None:
    tokenizer = tiny_tokenizer()
    [text] = read_texts("demo:calibration")
    text = Text(text.name, text.documents[:20])
    drawn = draw_windows(tokenizer, [text], 7, 30, 5)
    tokens = tokenise(tokenizer, text.documents)
    assert torch.equal(windows(drawn), torch.cat(calibration_batches(tokens, 7, 30, 5)))
    assert torch.equal(drawn.first, tokens[:30].long())
    assert drawn.description == "demo:calibration, 7 windows of 30 tokens, seed 5"


def test_what_was_drawn_is_told() -> None:
    told = draw(numbered([[9] * 9, [9] * 9], [0.7, 0.3]), 5, 4, 3, "whole").description
    assert told == (
        "text 0 (share 0.7, 4 windows); text 1 (share 0.3, 1 window); "
        "5 windows of 4 tokens, each from the start of a document, seed 3"
    )


def test_a_conversation_gives_its_window_as_the_template_writes_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = [Conversation(({"role": "user", "content": word * 40},)) for word in ("one ", "two ", "three ")]
    found = windows(draw_windows(tokenizer, [Text("chats", chats)], 3, 12, 0, sequences="whole"))
    written = [tokenizer(f"user: {word * 40}</s>")["input_ids"][:12] for word in ("one ", "two ", "three ")]
    assert sorted(found.tolist()) == sorted(written)


TOO_LITTLE = [
    (
        [[5, 9, 7, 3]],
        "whole",
        3,
        8,
        "has 4 documents, 1 of them with the 8 tokens of a window, fewer than the 3 needed",
    ),
    ([[5, 9, 7, 3]], "whole", 3, 8, "lower --seq-length to 5, or use --sequences packed"),
    (
        [[9, 9]],
        "whole",
        3,
        8,
        "2 of them with .* fewer than the 3 needed: lower --samples, give more documents, or use",
    ),
    ([[99], [9, 9]], "whole", 2, 100, "the calibration text text 0 has 1 document, 0 of them"),
    ([[99], [9]], "packed", 8, 8, "text text 1 has 9 tokens, room for 1 window of 8, fewer than the 4 needed"),
    (
        [[99], [99]],
        "packed",
        1,
        8,
        "the share of the text text 1 is less than one of 1 window: raise --samples, or leave",
    ),
    ([[99]], "padded", 1, 8, "--sequences cannot be 'padded': use packed, packed-no-bos or whole"),
    ([[99]], "whole", 0, 8, "--samples cannot be 0"),
    ([[99]], "whole", 1, 1, "--seq-length cannot be 1"),
]


@pytest.mark.parametrize(("lengths", "sequences", "samples", "length", "reason"), TOO_LITTLE)
def test_too_little_to_draw_from(
    lengths: list[list[int]], sequences: str, samples: int, length: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        draw(numbered(lengths, [1 / len(lengths)] * len(lengths)), samples, length, 0, sequences)


@pytest.mark.parametrize("sequences", ["packed", "whole"])
def test_a_seed_that_no_generator_takes(sequences: str) -> None:
    for seed, reason in ((2**63, "give a smaller number"), (-1, "give a whole number of at least 0")):
        with pytest.raises(InputError, match=f"--seed cannot be {seed}: {reason}"):
            draw(numbered([[99]], [1.0]), 4, 8, seed, sequences)


@pytest.mark.parametrize("shares", [(0.3, 0.3), (float("nan"), 1.0), (1.0, 0.0), ()])
def test_shares_that_do_not_come_to_one(shares: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"with the sum|is not a number|there is no text"):
        draw(numbered([[99]] * len(shares), shares), 4, 8, 0)


def test_a_digest_is_of_the_documents_and_the_share_whatever_the_name() -> None:
    said, other = ({"role": "user", "content": content} for content in ("Hello", "Good evening"))
    documents = [["ab", "c"], ["a", "bc"], ["ab"], [Conversation((said,))], [Conversation((other,))], ["\ud800"]]
    texts = [*(Text("a", each) for each in documents), Text("a", ["ab", "c"], Fraction(1, 2))]
    assert len({text.digest() for text in texts}) == len(texts)
    assert Text("b", ["ab", "c"]).digest() == texts[0].digest()
    assert Text("b", [Conversation((said,), "line 7 of b")]).digest() == texts[3].digest()
