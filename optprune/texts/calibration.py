"""Calibration windows, drawn from one text or from several with shares."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.errors import InputError
from optprune.system.wording import counted, shown
from optprune.texts.documents import Document, read_documents
from optprune.texts.windows import batched, check_at_least, drawn_windows, tokenise

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from torch import IntTensor, LongTensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHARE_PATTERN = re.compile(r"(.+?)=(\d{1,3}(?:\.\d{0,9})?|\.\d{1,9})(?:,|\Z)", re.DOTALL)
"""a text with its share: a comma ends it only behind a share, so that names may hold commas and equals signs"""
ROUNDED = Fraction(1, 100)
"""how far from 1 the sum of shares may be, since thirds have to be rounded"""


@dataclass(frozen=True)
class TextShare:
    """The name of a text, and the share of the windows that is drawn from it."""

    name: str
    share: Fraction


def read_shares(spec: str) -> tuple[TextShare, ...]:
    """The texts that a calibration names: one, or several with shares, as in `a.jsonl:text=0.7,b.txt=0.3`.

    What is there as a file or a folder under this name is one text, whatever its name looks like. A text ends at a
    comma behind a share, and its share begins at the last equals sign before it. InputError where a text has no share
    or is given twice, or the sum of the shares is not 1.
    """
    if Path(spec).exists() or not SHARE_PATTERN.match(spec):
        return (TextShare(spec, Fraction(1)),)
    texts, place = list[TextShare](), 0
    while place < len(spec):
        found = SHARE_PATTERN.match(spec, place)
        if found is None:
            raise InputError(
                f"the text {shown(spec[place:])} of the calibration has no share: write one behind each, as in "
                "a.jsonl:text=0.7,b.txt=0.3"
            )
        texts.append(TextShare(found[1], Fraction(found[2])))
        place = found.end()
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the text {name} is given twice: give it once, with the sum of its shares")
    check_shares([text.share for text in texts])
    return tuple(texts)


def check_shares(shares: Sequence[Fraction]) -> None:
    """Raise InputError unless all shares are above 0 and their sum is 1, to a hundredth."""
    if not shares:
        raise InputError("there is no text to draw from: give at least one")
    if min(shares) <= 0 or abs(sum(shares) - 1) > ROUNDED:
        listed = " + ".join(f"{float(share):g}" for share in shares)
        raise InputError(
            f"the shares of the texts are {listed}, with the sum {float(sum(shares)):g}: give shares above 0 with the "
            "sum 1, as in a.jsonl:text=0.7,b.txt=0.3"
        )


def divide_by_shares(samples: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """How many of so many windows each share gets, by largest remainders; of equal ones the first has precedence."""
    whole = sum(shares)
    exact = [samples * share / whole for share in shares]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The order of all windows, as (text, number within the text): each text's are spread evenly over the whole.

    Whatever is made of the first windows or of the last alone, every text has its share in it.
    """
    places = [
        (Fraction(2 * number + 1, 2 * count), text, number)
        for text, count in enumerate(counts)
        for number in range(count)
    ]
    return [(text, number) for _, text, number in sorted(places)]


SEQUENCES = ("packed", "whole")
"""how windows lie in a text: anywhere in the documents one after the other, or at the start of a document each"""


@dataclass(frozen=True, eq=False)
class Text:
    """Documents to draw windows from, and the share of the windows that they give."""

    name: str
    documents: Sequence[Document]
    share: float | Fraction = 1.0

    @property
    def characters(self) -> int:
        """How long all its documents are."""
        return sum(map(len, self.documents))


@dataclass(frozen=True, eq=False)
class DrawnWindows:
    """Calibration windows, and where they are from."""

    batches: "list[LongTensor]"
    """the windows in batches of token ids [batch, length]"""
    first: "LongTensor"
    """a window [length] that stands first in the first text, to compare logits on"""
    counts: tuple[int, ...]
    """how many windows each text gave"""
    description: str
    """all of it in words, for the report"""


def read_texts(spec: str) -> list[Text]:
    """The texts that a calibration names: one as `read_documents` takes it, or several with shares.

    Several are written as in `a.jsonl:text=0.7,b.txt=0.3`; their sum is 1, to a hundredth. InputError, in one
    sentence, when one cannot be read or the shares are none.
    """
    # The names and shares are checked before the first text is read.
    return [Text(text.name, read_documents(text.name), text.share) for text in read_shares(spec)]


def check_sequences(sequences: str) -> None:
    """Raise InputError when `sequences` is not known."""
    if sequences not in SEQUENCES:
        raise InputError(f"--sequences cannot be {sequences!r}: use {' or '.join(SEQUENCES)}")


def draw_windows(
    tokenizer: "Tokenizer",
    texts: Sequence[Text],
    samples: int,
    seq_length: int,
    seed: int,
    *,
    sequences: str = "packed",
    tokens_per_batch: int = 2048,
) -> DrawnWindows:
    """`samples` windows, from each text as many as its share is, by largest remainders; the same for the same seed.

    Packed, the windows of a text do not overlap, and lie anywhere in its documents, one after the other as `tokenise`
    has them. Whole, each begins where a document does, tokenised by itself, and ends within it: a document gives one
    window, and one that is shorter than a window gives none; no more documents are tokenised than that takes. A text
    gives the windows that it would give alone, and those of all are spread evenly over the batches. InputError where
    a text is too short, or its share is less than a window.
    """
    return WindowSampler(tokenizer, texts, sequences).draw(samples, seq_length, seed, tokens_per_batch)


@dataclass(frozen=True, eq=False)
class WindowSampler:
    """What `draw_windows` gives for one seed after the other; packed texts are tokenised once for all of them."""

    tokenizer: "Tokenizer"
    texts: Sequence[Text]
    sequences: str = "packed"
    _packed_tokens: "dict[str, IntTensor]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sequences(self.sequences)

    def draw(self, samples: int, seq_length: int, seed: int, tokens_per_batch: int = 2048) -> DrawnWindows:
        """The windows of a seed: see `draw_windows`."""
        check_at_least("--samples", samples, 1)
        check_at_least("--seq-length", seq_length, 2)
        texts = self.texts
        counts = divide_by_shares(samples, _shares(texts))
        if 0 in counts:
            name = texts[counts.index(0)].name
            raise InputError(
                f"the share of the text {name} is none of {counted(samples, 'window')}: raise --samples, or leave it "
                "out"
            )
        import torch

        several, drawn, firsts = len(texts) > 1, list[torch.Tensor](), list[torch.Tensor]()
        for text, count in zip(texts, counts, strict=True):
            what = f"calibration text {text.name}" if several else "calibration text"
            if self.sequences == "packed":
                tokens = self._tokens(text)
                windows, first = drawn_windows(tokens, count, seq_length, seed, what), tokens[:seq_length].long()
            else:
                windows, first = _whole(self.tokenizer, text.documents, count, seq_length, seed, what)
            drawn.append(windows)
            firsts.append(first)
        mixed = torch.stack([drawn[text][number] for text, number in interleave(counts)])
        description = _in_words(texts, counts, seq_length, seed, self.sequences)
        return DrawnWindows(batched(mixed, tokens_per_batch), firsts[0], counts, description)  # type: ignore[arg-type]

    def _tokens(self, text: Text) -> "IntTensor":
        """All tokens of a text."""
        if text.name not in self._packed_tokens:
            self._packed_tokens[text.name] = tokenise(self.tokenizer, text.documents)
        return self._packed_tokens[text.name]


def _shares(texts: Sequence[Text]) -> list[Fraction]:
    try:
        # As they are written: 0.7 is seven tenths, and not the float that is nearest to them.
        shares = [Fraction(str(text.share)) for text in texts]
    except ValueError as error:
        raise InputError(f"a share is no number: {error}; give shares with the sum 1") from error
    check_shares(shares)
    return shares


def _whole(
    tokenizer: "Tokenizer", documents: Sequence[Document], count: int, seq_length: int, seed: int, what: str
) -> "tuple[LongTensor, LongTensor]":
    import torch

    generator = torch.Generator().manual_seed(seed)
    windows, lengths = list[torch.Tensor](), list[int]()
    for number in torch.randperm(len(documents), generator=generator).tolist():
        tokens = tokenise(tokenizer, [documents[number]], seq_length)
        lengths.append(len(tokens))
        if len(tokens) >= seq_length:
            windows.append(tokens[:seq_length].long())
        if len(windows) == count:
            return torch.stack(windows), windows[0]  # type: ignore[return-value]
    raise InputError(_too_few(what, lengths, len(windows), count, seq_length))


def _too_few(what: str, lengths: list[int], fitting: int, count: int, seq_length: int) -> str:
    # None of the others is as long as a window, so that their lengths are shown in full.
    enough = sorted(lengths, reverse=True)[count - 1] if count <= len(lengths) else 0
    advice = f"lower --seq-length to {enough}" if enough >= 2 else "lower --samples, give more documents"
    return (
        f"the {what} has {counted(len(lengths), 'document')}, {fitting} of them with the {seq_length} tokens of a "
        f"window, fewer than the {count} needed: {advice}, or use --sequences packed"
    )


def _in_words(texts: Sequence[Text], counts: Sequence[int], seq_length: int, seed: int, sequences: str) -> str:
    start = "" if sequences == "packed" else ", each from the start of a document"
    every = f"{counted(sum(counts), 'window')} of {seq_length} tokens{start}, seed {seed}"
    if len(texts) == 1:
        return f"{texts[0].name}, {every}"
    parts = [
        f"{text.name} (share {float(text.share):g}, {counted(count, 'window')})"
        for text, count in zip(texts, counts, strict=True)
    ]
    return "; ".join([*parts, every])
