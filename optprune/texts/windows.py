"""Tokens of a text, and windows of them for calibration or evaluation.

A long text is tokenised in pieces with context on both sides, and cut between two tokens. Two checks ensure that the
whole text has the same tokens at the cut. First, no token of the vocabulary contains the two characters that meet at
the cut, so no merge of byte pairs and no unigram crosses it, however far away it began. Second, the next piece, which
begins elsewhere, has the same tokens for hundreds of characters on both sides of the cut, so the splitting into words,
which depends on the next word at most, is the same. Where a check fails, the text is tokenised as a whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optprune.errors import InputError, check_at_least, check_count, check_kind
from optprune.system.wording import counted
from optprune.texts.documents import Conversation, Document, conversation_pieces

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from torch import IntTensor, LongTensor, Tensor
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE = 1 << 18
"""the number of characters of a piece"""
CONTEXT = 1 << 11
"""the number of characters of context before a piece; after it there are three times as many"""


class CannotSplit(Exception):
    """Signal that a text must be tokenised as a whole."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a part of the text, and their first characters."""

    ids: Sequence[int]
    starts: Sequence[int]

    def around(self, place: int) -> list[tuple[int, int]]:
        """Return pairs of a distance and a token id, for the tokens near a place."""
        near = CONTEXT // 2
        pairs = zip(self.starts, self.ids, strict=True)
        return [(start - place, token) for start, token in pairs if -near <= start - place < near]


def token_pieces(tokenizer: "Tokenizer", documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield the token ids of documents joined by blank lines, in pieces; CannotSplit where that would change them."""
    if not tokenizer.is_fast:
        raise CannotSplit
    before, after = _specials(tokenizer)
    coming, buffer, ended = _joined(documents), "", False
    begin, overlap, pairs = 0, list[tuple[int, int]](), set[str]()
    yield before
    while True:
        # The buffer begins with the context of the piece, which begins at the cut of the previous piece.
        most, parts = begin + PIECE + 3 * CONTEXT, [buffer]
        size = len(buffer)
        while size <= most and not ended:
            part = next(coming, None)
            ended = part is None
            parts.append(part or "")
            size += len(parts[-1])
        buffer = "".join(parts)
        # A document may be larger than a piece: its rest is not copied for each piece.
        window = buffer[:most]
        found = _tokenise(tokenizer, window)
        first = found.starts.index(begin) if begin in found.starts else 0
        if begin and (not overlap or found.around(begin) != overlap):
            raise CannotSplit
        if ended and len(window) == len(buffer):
            yield [*found.ids[first:], *after]
            return
        pairs = pairs or {token[at : at + 2] for token in tokenizer.get_vocab() for at in range(len(token) - 1)}
        last = _cut(tokenizer, found, begin + PIECE + CONTEXT, pairs)
        yield list(found.ids[first:last])
        place = found.starts[last]
        overlap, begin = found.around(place), CONTEXT
        buffer = buffer[place - CONTEXT :]


def _joined(documents: Iterable[str]) -> Iterator[str]:
    """Yield the text in parts of limited length."""
    for number, document in enumerate(documents):
        if number:
            yield "\n\n"
        for first in range(0, len(document), PIECE):
            yield document[first : first + PIECE]


def _tokenise(tokenizer: "Tokenizer", text: str) -> _Tokens:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _Tokens(found["input_ids"], [start for start, _ in found["offset_mapping"]])


def _specials(tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Return the special tokens before and after every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for first in range(len(full) - len(bare) + 1):
        if bare and full[first : first + len(bare)] == bare:
            return full[:first], full[first + len(bare) :]
    raise CannotSplit


def _cut(tokenizer: "Tokenizer", found: _Tokens, place: int, pairs: set[str]) -> int:
    """Return the index of the token nearest to a place before which the text can be cut."""
    starts, near = found.starts, range(place - CONTEXT // 2, place + CONTEXT // 2)
    able = (
        number
        for number in range(1, len(starts))
        # Tokens that are parts of one character begin at the same place.
        if starts[number] in near and starts[number - 1] < starts[number]
    )
    for number in sorted(able, key=lambda number: abs(starts[number] - place)):
        left, right = tokenizer.convert_ids_to_tokens([found.ids[number - 1], found.ids[number]])
        if left[-1:] + right[:1] not in pairs:
            return number
    raise CannotSplit


def tokenise(tokenizer: "Tokenizer", documents: Iterable[Document], most: int | None = None) -> "IntTensor":
    """Return the token ids [tokens] of documents joined by blank lines and tokenised once, as in the papers.

    InputError for a single text, and for documents of another kind.
    Conversations are written by the chat template of the tokenizer, with nothing between them; InputError without a
    template, or for a mix of texts and conversations. With `most`, tokenising stops at this number of tokens or a few
    more. The text is tokenised in pieces if that gives the same tokens, and each id takes four bytes of memory.
    """
    import torch

    if isinstance(documents, str):
        raise InputError("the documents cannot be one text: give a list of texts, e.g. [text]")
    documents = documents if isinstance(documents, Sequence) else list(documents)
    for document in documents:
        check_kind("a document", document, (str, Conversation), "give texts, or conversations as read_texts does")
    texts = [document for document in documents if isinstance(document, str)]
    chats = [document for document in documents if isinstance(document, Conversation)]
    if texts and chats:
        raise InputError("texts and conversations cannot be joined: tokenise them separately")
    pieces, count = list[torch.Tensor](), 0
    try:
        for ids in conversation_pieces(tokenizer, chats) if chats else token_pieces(tokenizer, texts):
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            count += len(ids)
            if most is not None and count >= most:
                break
    except CannotSplit:
        whole = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
        pieces = [torch.tensor(whole, dtype=torch.int32)]
    return torch.cat(pieces)  # type: ignore[return-value]  # IntTensor is only a name


def begin_tokens(tokenizer: "Tokenizer") -> list[int]:
    """Return the ids of the special tokens that a tokenizer puts before every text: BOS in most models, or none."""
    try:
        return list(_specials(tokenizer)[0])
    except CannotSplit:
        return []


def with_begin(windows: "LongTensor", begin: Sequence[int]) -> "LongTensor":
    """Return windows [n, length] with their first tokens replaced by the ids that begin a text.

    A window from the middle of a text begins as a text does, at the same place and with the same length, so with one
    such id all predicted tokens stay the same. InputError when the windows have no room for a token of the text.
    """
    import torch

    if not begin:
        return windows
    if windows.shape[1] < len(begin) + 2:
        raise InputError(
            f"windows of {counted(windows.shape[1], 'token')} have no room for the {len(begin)} that begin a text and "
            f"two more: raise --seq-length to {len(begin) + 2} or more"
        )
    replaced = windows.clone()
    replaced[:, : len(begin)] = torch.tensor(begin, dtype=windows.dtype)
    return replaced  # type: ignore[return-value]  # LongTensor is only a name


def evaluation_windows(
    tokens: "Tensor", seq_length: int, windows: int | None = None, begin: Sequence[int] = ()
) -> "LongTensor":
    """Return the first `windows` (None: all) consecutive windows [n, seq_length]; the rest of the tokens is dropped.

    The first tokens of each window are replaced by `begin`, the ids of `begin_tokens`: see `with_begin`. InputError
    when the tokens are too few.
    """
    check_at_least("--seq-length", seq_length, 2)
    if windows is not None:
        check_at_least("--windows", windows, 1)
    fitting = len(tokens) // seq_length
    wanted = fitting if windows is None else windows
    if fitting < max(wanted, 1):
        raise InputError(_too_short("evaluation text", len(tokens), fitting, max(wanted, 1), seq_length, "--windows"))
    found = tokens[: wanted * seq_length].view(wanted, seq_length).long()
    return with_begin(found, begin)  # type: ignore[arg-type]  # LongTensor is only a name


def calibration_batches(
    tokens: "Tensor",
    samples: int,
    seq_length: int,
    seed: int,
    tokens_per_batch: int = 2048,
    begin: Sequence[int] = (),
) -> "list[LongTensor]":
    """Return `samples` random windows without overlap, in batches of about `tokens_per_batch` tokens.

    The first tokens of each window are replaced by `begin`, the ids of `begin_tokens`: see `with_begin`. InputError
    when the tokens are too few.
    """
    return batched(drawn_windows(tokens, samples, seq_length, seed, begin=begin), tokens_per_batch)


def drawn_windows(
    tokens: "Tensor",
    samples: int,
    seq_length: int,
    seed: int,
    what: str = "calibration text",
    worth: "Tensor | None" = None,
    begin: Sequence[int] = (),
) -> "LongTensor":
    """Return the windows [samples, seq_length] of `calibration_batches`; fewer samples are the first of more.

    With the `worth` of each token [n] the windows with the largest sums are drawn, in a random order. InputError, with
    `what` as the name of the text, when its tokens are too few.
    """
    import torch

    check_at_least("--samples", samples, 1)
    check_at_least("--seq-length", seq_length, 2)
    check_count("--seed", seed)
    fitting = len(tokens) // seq_length
    if fitting < samples:
        raise InputError(_too_short(what, len(tokens), fitting, samples, seq_length, "--samples"))
    generator = torch.Generator().manual_seed(seed)
    # The start of the first window is random too, so that every token can be drawn.
    start = int(torch.randint(len(tokens) - fitting * seq_length + 1, (), generator=generator))
    inside = slice(start, start + fitting * seq_length)
    windows, order = tokens[inside].view(fitting, seq_length), torch.randperm(fitting, generator=generator)
    if worth is not None:
        sums = worth[inside].view(fitting, seq_length).sum(1)[order]
        best = sums.argsort(descending=True, stable=True)[:samples]
        order = order[best.sort().values]
    return with_begin(windows[order[:samples]].long(), begin)  # type: ignore[arg-type]


def batched(windows: "LongTensor", tokens_per_batch: int = 2048) -> "list[LongTensor]":
    """Return windows [n, length] in batches of about `tokens_per_batch` tokens, in order."""
    return list(windows.split(max(1, tokens_per_batch // windows.shape[1])))  # type: ignore[arg-type]


def check_seq_length(config: "PretrainedConfig", seq_length: int) -> None:
    """Raise InputError when windows are longer than the number of positions of a model."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_length > limit:
        raise InputError(
            f"windows of {seq_length} tokens are longer than the {limit} positions of the model: "
            f"pass --seq-length {limit} or less"
        )


def check_vocabulary(config: "PretrainedConfig", tokens: "Tensor") -> None:
    """Raise InputError when a token id has no embedding in the model."""
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer gives token {largest}, but the model has only {config.vocab_size} embeddings: "
            "the tokenizer belongs to another model"
        )


def _too_short(what: str, tokens: int, fitting: int, wanted: int, seq_length: int, option: str) -> str:
    return (
        f"the {what} has {counted(tokens, 'token')}, room for {counted(fitting, 'window')} of {seq_length}, fewer than "
        f"the {wanted} needed: lower {option if fitting else '--seq-length'}, or give a longer text"
    )
