"""Shares of texts: how they are written, how windows are divide_by_shares among them, and the order they come in."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.texts.calibration import divide_by_shares, interleave, read_shares

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
