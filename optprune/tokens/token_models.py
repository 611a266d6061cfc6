"""Models of tokenizers as data: the tokens that must stay, how often each is needed, and the model of fewer tokens.

A tokenizer writes text as tokens by merges (BPE; Sennrich, Haddow and Birch 2016, arXiv 1508.07909) or by the most
likely segmentation (unigram; Kudo 2018, arXiv 1804.10959). Both are read from the parts of a `tokenizer.json`.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optprune.errors import InputError

Counts = NDArray[np.float64]
"""how often each token occurs, by its id"""
Pair = tuple[str, str]
ROUNDS = 8
"""the largest number of rounds in which the occurrences of removed unigram tokens pass to their pieces"""


class TokenModel(ABC):
    """The model of a tokenizer: its tokens by id, and what follows for a text if some of them are removed."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Read the parsed content of a tokenizer.json."""
        self.data: Mapping[str, Any] = data["model"]
        self.by_bytes = "ByteLevel" in str([data.get("pre_tokenizer"), data.get("decoder")])
        self.byte_fallback = bool(self.data.get("byte_fallback"))

    @property
    @abstractmethod
    def ids(self) -> Mapping[str, int]:
        """The ids of the tokens by their text."""

    @abstractmethod
    def needs(self, counts: Counts) -> Counts:
        """Return how much each token is needed by a text in which the tokens occur so often."""

    @abstractmethod
    def required(self, text: str) -> Sequence[str]:
        """Return the tokens without which a token cannot be formed, from the shortest to the token itself."""

    @abstractmethod
    def rank(self, text: str) -> float:
        """Return the place of a token in the order in which the tokenizer's own training chose tokens."""

    @abstractmethod
    def reduced(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Return the data of the model with the tokens in `new` alone, which has their new ids by their old ones."""

    def always(self) -> set[int]:
        """Return the ids of the tokens that stay, so that any text can still be written.

        They are the bytes. Without bytes they are all characters. The token for unknown characters stays too.
        """
        unknown = self.data.get("unk_token")
        bytes_alone = self.byte_fallback and not self.by_bytes
        return {
            index
            for text, index in self.ids.items()
            if (is_byte(text) if bytes_alone else len(text) == 1) or text == unknown
        }

    def choose(self, counts: Counts, keep: int, always: set[int]) -> list[int]:
        """Return the ids of `keep` tokens in their order: those in `always`, then those that are needed most.

        Every token comes with the tokens that it requires. Of equally needed tokens the one of the lowest rank stays.
        """
        needed = self.needs(counts)
        kept = set(always)
        names = sorted(
            (text for text, index in self.ids.items() if index not in kept),
            key=lambda text: (-needed[self.ids[text]], self.rank(text)),
        )
        for text in names:
            if len(kept) >= keep:
                break
            missing = {self.ids[each] for each in self.required(text)} - kept
            if len(kept) + len(missing) <= keep:
                kept |= missing
        return sorted(kept)


class MergedTokens(TokenModel):
    """A byte pair encoding: a token is the result of a merge of two tokens.

    A text has one token fewer after each merge. So a token is needed as often as its merge is applied, by itself or on
    the way to a longer token: the tokens with the largest such counts write the text with the fewest tokens, and the
    parts of a token are needed at least as often as the token.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if self.data.get(name)]
        if marks:
            raise InputError(
                f"the tokenizer marks parts of words ({', '.join(marks)}), and its vocabulary cannot be pruned: only "
                "those of merged bytes and of merged pieces can"
            )
        self._ids: dict[str, int] = dict(self.data["vocab"])
        self.merges: list[Pair] = [_pair(merge) for merge in self.data["merges"]]
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}
        results = defaultdict[str, list[Pair]](list)
        for pair in self.ranks:
            results["".join(pair)].append(pair)
        self.parents = {
            text: pairs[0] if len(pairs) == 1 else self._last_merge(text, pairs) for text, pairs in results.items()
        }

    @property
    def ids(self) -> Mapping[str, int]:
        return self._ids

    def needs(self, counts: Counts) -> Counts:
        needed = counts.astype(np.float64)
        # A token is longer than its parts, so that its count is complete before it passes to them.
        for text in sorted(self._ids, key=len, reverse=True):
            for part in self.parents.get(text, ()):
                if part in self._ids:
                    needed[self._ids[part]] += needed[self._ids[text]]
        return needed

    def required(self, text: str) -> Sequence[str]:
        found, open_parts = [text], list(self.parents.get(text, ()))
        while open_parts:
            part = open_parts.pop()
            if part in self._ids:
                found.append(part)
                open_parts += self.parents.get(part, ())
        return found[::-1]

    def rank(self, text: str) -> float:
        return self.ranks.get(self.parents.get(text, ("", "")), -1)

    def reduced(self, new: Mapping[int, int]) -> dict[str, Any]:
        vocabulary = {text: new[index] for text, index in self._ids.items() if index in new}
        kept = [pair for pair in self.merges if all(part in vocabulary for part in (*pair, "".join(pair)))]
        return {**self.data, "vocab": vocabulary, "merges": [list(pair) for pair in kept]}

    def _last_merge(self, text: str, pairs: Sequence[Pair]) -> Pair:
        """Return the merge that forms a token when its characters are merged by rank; the first one if none does."""
        parts = list(text)
        while len(parts) > 2:
            ranked = [(self.ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not ranked:
                break
            _, place = min(ranked)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        last = tuple(parts)
        return last if len(last) == 2 and last in pairs else min(pairs, key=self.ranks.__getitem__)


class ScoredTokens(TokenModel):
    """A unigram model: a text has the segmentation with the largest sum of scores, and any token can be left out.

    A token is needed as often as it occurs, or would occur once the tokens that are needed less are removed.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.scores: list[tuple[str, float]] = [(str(text), float(score)) for text, score in self.data["vocab"]]
        self._ids = {text: index for index, (text, _) in enumerate(self.scores)}

    @property
    def ids(self) -> Mapping[str, int]:
        return self._ids

    def always(self) -> set[int]:
        unknown = self.data.get("unk_id")
        return super().always() | ({int(unknown)} if unknown is not None else set())

    def needs(self, counts: Counts) -> Counts:
        return counts

    def choose(self, counts: Counts, keep: int, always: set[int]) -> list[int]:
        kept, needed = super().choose(counts, keep, always), counts
        for _ in range(ROUNDS):
            needed, last = self._passed_on(counts, kept), kept
            kept = super().choose(needed, keep, always)
            if kept == last:
                break
        return kept

    def _passed_on(self, counts: Counts, kept: Sequence[int]) -> Counts:
        """Return the counts with those of removed tokens added to their pieces among the kept ones."""
        from tokenizers.models import Unigram

        here, needed = set(kept), counts.copy()
        data = self.reduced({old: place for place, old in enumerate(kept)})
        segments = Unigram([tuple(piece) for piece in data["vocab"]], data["unk_id"], self.byte_fallback)
        for index in np.flatnonzero(counts):
            if int(index) not in here and index < len(self.scores):
                for piece in segments.tokenize(self.scores[index][0]):
                    if piece.value in self._ids:
                        needed[self._ids[piece.value]] += counts[index]
        return needed

    def required(self, text: str) -> Sequence[str]:
        return [text]

    def rank(self, text: str) -> float:
        return -self.scores[self._ids[text]][1]

    def reduced(self, new: Mapping[int, int]) -> dict[str, Any]:
        order = sorted((index for index in new if index < len(self.scores)), key=new.__getitem__)
        unknown = self.data.get("unk_id")
        kept = [list(self.scores[index]) for index in order]
        return {**self.data, "vocab": kept, "unk_id": None if unknown is None else new[int(unknown)]}


def token_model(data: Mapping[str, Any]) -> TokenModel:
    """Return the model of a parsed tokenizer.json; InputError for another kind than BPE and unigram."""
    kind = data["model"].get("type")
    if kind == "BPE":
        return MergedTokens(data)
    if kind == "Unigram":
        return ScoredTokens(data)
    raise InputError(f"the vocabulary of a {kind} tokenizer cannot be pruned, only that of a BPE or unigram one")


def is_byte(text: str) -> bool:
    """Return whether a token stands for a byte, as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pair(merge: "str | Sequence[str]") -> Pair:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second
