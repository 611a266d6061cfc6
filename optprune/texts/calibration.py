"""Calibration windows, drawn from one text or from several with shares."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.errors import InputError, check_at_least, check_count
from optprune.system.wording import counted, either, shown
from optprune.texts.documents import Document, read_documents
from optprune.texts.windows import batched, begin_tokens, drawn_windows, tokenise

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from torch import IntTensor, LongTensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from optprune.models import ImageFeatures

SHARE_PATTERN = re.compile(r"(.+?)=(\d{1,3}(?:\.\d{0,9})?|\.\d{1,9})(?:,|\Z)", re.DOTALL)
"""a text with its share; a comma ends it only after a share, so that names may contain commas and equals signs"""
ROUNDED = Fraction(1, 100)
"""the tolerance for the sum of shares, which allows rounded thirds"""


@dataclass(frozen=True)
class TextShare:
    """Name of a text, and the share of windows drawn from it."""

    name: str
    share: Fraction


def read_shares(spec: str) -> tuple[TextShare, ...]:
    """Return the names and shares in a calibration option: one text, or several as in `a.jsonl:text=0.7,b.txt=0.3`.

    The name of an existing file or folder is always a single text. A text ends at a comma after a share, which begins
    at the last equals sign before the comma. InputError where a text has no share or is given twice, or the sum of the
    shares is not 1.
    """
    if Path(spec).exists() or not SHARE_PATTERN.match(spec):
        return (TextShare(spec, Fraction(1)),)
    texts, place = list[TextShare](), 0
    while place < len(spec):
        found = SHARE_PATTERN.match(spec, place)
        if found is None:
            raise InputError(
                f"the text {shown(spec[place:])} of the calibration has no share: write one after each text, as in "
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
    """Return the number of windows for each share, by largest remainders; ties go to the first."""
    whole = sum(shares)
    exact = [samples * share / whole for share in shares]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the order of all windows, as (text, number within the text), with each text spread evenly.

    Both the first and the last windows then contain every text by its share.
    """
    places = [
        (Fraction(2 * number + 1, 2 * count), text, number)
        for text, count in enumerate(counts)
        for number in range(count)
    ]
    return [(text, number) for _, text, number in sorted(places)]


SEQUENCES = ("packed", "packed-no-bos", "whole")
"""packed: windows anywhere in the joined documents, which begin as the tokenizer begins a text (BOS in most models);
packed-no-bos: without that, as in papers; whole: each window at the start of a document"""
PACKED = SEQUENCES[:2]
"""the kinds of windows that an evaluation can have"""


@dataclass(frozen=True, eq=False)
class Text:
    """Documents of a text, and its share of the windows."""

    name: str
    documents: Sequence[Document]
    share: float | Fraction = 1.0

    @property
    def characters(self) -> int:
        """The number of characters of all documents."""
        return sum(map(len, self.documents))

    def digest(self) -> str:
        """Return a SHA-256 hex digest of the documents and the share."""
        found = hashlib.sha256(str(self.share).encode())
        for document in self.documents:
            plain = document if isinstance(document, str) else document.messages
            found.update(json.dumps(plain, sort_keys=True, default=str).encode())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class DrawnWindows:
    """Calibration windows and their source."""

    batches: "list[LongTensor]"
    """batches of token ids [batch, length]"""
    first: "LongTensor"
    """the first window [length] of the first text, for the comparison of logits"""
    counts: tuple[int, ...]
    """the number of windows of each text"""
    description: str
    """the source in words, for the report"""
    images: "ImageFeatures | None" = None
    """the features of images, where token ids may be numbers of them"""


def read_texts(spec: str) -> list[Text]:
    """Return the texts of a calibration option: one as in `read_documents`, or several with shares.

    Several are written as in `a.jsonl:text=0.7,b.txt=0.3`, with a sum of 1 to a hundredth. InputError when a text
    cannot be read or the shares are wrong.
    """
    # All names and shares are checked before the first text is read.
    return [Text(text.name, read_documents(text.name), text.share) for text in read_shares(spec)]


def check_sequences(sequences: str, known: Sequence[str] = SEQUENCES) -> None:
    """Raise InputError unless `sequences` is known."""
    if sequences not in known:
        raise InputError(f"--sequences cannot be {sequences!r}: use {either(known)}")


def begin_of(tokenizer: "Tokenizer", sequences: str) -> list[int]:
    """Return the token ids that windows begin with, where a tokenizer puts some before every text.

    Packed windows of texts or conversations have them, as have those of an evaluation beside whole windows; only
    packed-no-bos has none.
    """
    return [] if sequences == "packed-no-bos" else begin_tokens(tokenizer)


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
    """Return `samples` random windows, from each text by its share; equal seeds give equal windows.

    Packed windows lie anywhere in the documents as joined by `tokenise`, without overlap. Their first tokens are
    replaced by those that the tokenizer puts before every text (see `with_begin`), unless `sequences` is packed-no-bos.
    A whole window is the beginning of a document that is tokenised alone; each document has at most one, and a document
    shorter than a window has none; only the needed documents are tokenised. The windows of a text do not depend on the
    other texts, and are spread evenly over the batches. InputError where a text is too short, or its share is less than
    a window.
    """
    return WindowSampler(tokenizer, texts, sequences).draw(samples, seq_length, seed, tokens_per_batch)


@dataclass(frozen=True, eq=False)
class WindowSampler:
    """Sampler of windows as in `draw_windows`, for several seeds; packed texts are tokenised once."""

    tokenizer: "Tokenizer"
    texts: Sequence[Text]
    sequences: str = "packed"
    _packed_tokens: "dict[str, IntTensor]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sequences(self.sequences)

    def draw(self, samples: int, seq_length: int, seed: int, tokens_per_batch: int = 2048) -> DrawnWindows:
        """Return the windows of a seed: see `draw_windows`."""
        check_at_least("--samples", samples, 1)
        check_at_least("--seq-length", seq_length, 2)
        check_count("--seed", seed)
        texts = self.texts
        counts = divide_by_shares(samples, _shares(texts))
        if 0 in counts:
            name = texts[counts.index(0)].name
            raise InputError(
                f"the share of the text {name} is less than one of {counted(samples, 'window')}: raise --samples, or "
                "leave it out"
            )
        import torch

        begin = [] if self.sequences == "whole" else begin_of(self.tokenizer, self.sequences)
        several, drawn, firsts = len(texts) > 1, list[torch.Tensor](), list[torch.Tensor]()
        for text, count in zip(texts, counts, strict=True):
            what = f"calibration text {text.name}" if several else "calibration text"
            if self.sequences == "whole":
                windows, first = _whole(self.tokenizer, text.documents, count, seq_length, seed, what)
            else:
                tokens = self._tokens(text)
                windows = drawn_windows(tokens, count, seq_length, seed, what, begin=begin)
                first = tokens[:seq_length].long()
            drawn.append(windows)
            firsts.append(first)
        mixed = torch.stack([drawn[text][number] for text, number in interleave(counts)])
        start = ", each from the start of a document" if self.sequences == "whole" else ""
        if begin:
            start = f", each begun with {begin_in_words(self.tokenizer, begin)}"
        description = _in_words(texts, counts, f"{seq_length} tokens{start}", seed)
        return DrawnWindows(batched(mixed, tokens_per_batch), firsts[0], counts, description)  # type: ignore[arg-type]

    def _tokens(self, text: Text) -> "IntTensor":
        """Return all tokens of a text."""
        if text.name not in self._packed_tokens:
            self._packed_tokens[text.name] = tokenise(self.tokenizer, text.documents)
        return self._packed_tokens[text.name]


def _shares(texts: Sequence[Text]) -> list[Fraction]:
    try:
        # Exact decimals: 0.7 is seven tenths, not the nearest float.
        shares = [Fraction(str(text.share)) for text in texts]
    except ValueError as error:
        raise InputError(f"a share is not a number: {error}; give shares with the sum 1") from error
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
    # All other documents are shorter than a window, so their lengths are exact.
    enough = sorted(lengths, reverse=True)[count - 1] if count <= len(lengths) else 0
    advice = f"lower --seq-length to {enough}" if enough >= 2 else "lower --samples, give more documents"
    return (
        f"the {what} has {counted(len(lengths), 'document')}, {fitting} of them with the {seq_length} tokens of a "
        f"window, fewer than the {count} needed: {advice}, or use --sequences packed"
    )


def begin_in_words(tokenizer: "Tokenizer", begin: Sequence[int]) -> str:
    """Return the tokens with the ids `begin`, joined by spaces, for a report."""
    return " ".join(tokenizer.convert_ids_to_tokens(list(begin)))


def _in_words(texts: Sequence[Text], counts: Sequence[int], size: str, seed: int) -> str:
    every = f"{counted(sum(counts), 'window')} of {size}, seed {seed}"
    if len(texts) == 1:
        return f"{texts[0].name}, {every}"
    parts = [
        f"{text.name} (share {float(text.share):g}, {counted(count, 'window')})"
        for text, count in zip(texts, counts, strict=True)
    ]
    return "; ".join([*parts, every])
