"""Tokenising piece by piece: the tokens of a whole text, of which only a piece is with the tokenizer at a time.

A piece is tokenised with what stands around it, and the text is cut between two of its tokens. That the whole text has
the same tokens there is seen from two facts. No token of the vocabulary holds the two symbols side by side that meet at
the cut, so that neither a merge of byte pairs nor a unigram reaches across it, however far away it began. And the next
piece, which begins elsewhere, has the same tokens for hundreds of characters on both sides of the cut, so that the
splitting into words, which looks no further than the next word, is in step. Where one of them fails, the text is
tokenised whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE = 1 << 18
"""the characters of a piece"""
CONTEXT = 1 << 11
"""the characters that stand before a piece; behind it there are three times as many"""


class NoCut(Exception):
    """The text cannot be seen to have the tokens of its pieces."""


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a part of the text, and where in it each begins."""

    ids: Sequence[int]
    starts: Sequence[int]

    def around(self, place: int) -> list[tuple[int, int]]:
        """The tokens that begin near a place, by their distance from it."""
        near = CONTEXT // 2
        pairs = zip(self.starts, self.ids, strict=True)
        return [(start - place, token) for start, token in pairs if -near <= start - place < near]


def token_pieces(tokenizer: "Tokenizer", documents: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of the documents joined by blank lines, in pieces; NoCut where they must be tokenised whole."""
    if not tokenizer.is_fast:
        raise NoCut
    before, after = _specials(tokenizer)
    coming, buffer, ended = _joined(documents), "", False
    begin, seen, pairs = 0, list[tuple[int, int]](), set[str]()
    yield before
    while True:
        # The buffer begins with the context of the piece, which begins where the one before it was cut.
        most, parts = begin + PIECE + 3 * CONTEXT, [buffer]
        size = len(buffer)
        while size <= most and not ended:
            part = next(coming, None)
            ended = part is None
            parts.append(part or "")
            size += len(parts[-1])
        buffer = "".join(parts)
        # A document may be larger than all pieces: what is not needed yet is not copied again for each.
        window = buffer[:most]
        found = _tokenise(tokenizer, window)
        first = found.starts.index(begin) if begin in found.starts else 0
        if begin and (not seen or found.around(begin) != seen):
            raise NoCut
        if ended and len(window) == len(buffer):
            yield [*found.ids[first:], *after]
            return
        pairs = pairs or {token[at : at + 2] for token in tokenizer.get_vocab() for at in range(len(token) - 1)}
        last = _cut(tokenizer, found, begin + PIECE + CONTEXT, pairs)
        yield list(found.ids[first:last])
        place = found.starts[last]
        seen, begin = found.around(place), CONTEXT
        buffer = buffer[place - CONTEXT :]


def _joined(documents: Iterable[str]) -> Iterator[str]:
    """The parts of the text, none of them long."""
    for number, document in enumerate(documents):
        if number:
            yield "\n\n"
        for first in range(0, len(document), PIECE):
            yield document[first : first + PIECE]


def _tokenise(tokenizer: "Tokenizer", text: str) -> _Tokens:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _Tokens(found["input_ids"], [start for start, _ in found["offset_mapping"]])


def _specials(tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """The tokens that are put before every text, and behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for first in range(len(full) - len(bare) + 1):
        if bare and full[first : first + len(bare)] == bare:
            return full[:first], full[first + len(bare) :]
    raise NoCut


def _cut(tokenizer: "Tokenizer", found: _Tokens, place: int, pairs: set[str]) -> int:
    """The number of the token nearest to a place at which the text can be cut."""
    starts, near = found.starts, range(place - CONTEXT // 2, place + CONTEXT // 2)
    able = (
        number
        for number in range(1, len(starts))
        # Where tokens hold parts of one character, they begin at the same place.
        if starts[number] in near and starts[number - 1] < starts[number]
    )
    for number in sorted(able, key=lambda number: abs(starts[number] - place)):
        left, right = tokenizer.convert_ids_to_tokens([found.ids[number - 1], found.ids[number]])
        if left[-1:] + right[:1] not in pairs:
            return number
    raise NoCut
