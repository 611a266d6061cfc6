"""Targets of restoration: the dense model's predictions as predictions of the tokens that stay."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optprune.tokens.tokenizer import SmallerVocabulary

Pieces = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PushForward:
    """Map from predictions of all tokens to predictions of the tokens that stay.

    A token is written by its pieces, so that its probability belongs to its first piece. Once some of the pieces s of
    a token have been written behind a text, the next piece is predicted by all tokens that begin with s:

        q(i | text, s) = [p(s) q(i) + sum of p(t) over the t that go on with piece i behind s] / (p(s) + sum of p(t))

    Here p is the dense model's prediction at the text, p(s) that of the token with exactly these pieces, and q(i) the
    probabilities of first pieces behind that token. So the smaller vocabulary predicts the same texts: the product of
    the probabilities of a token's pieces, and of no further piece, is the probability of the token.
    """

    vocabulary: SmallerVocabulary
    rows: int
    """the number of embeddings of the dense model"""
    every: bool = False
    """whether predictions are of all tokens that stay, and not of the receiving ones alone"""

    @cached_property
    def removed(self) -> Tensor:
        """The old ids of the removed tokens."""
        kept = self.vocabulary.new_ids
        return torch.tensor([old for old in self.vocabulary.pieces if old not in kept], dtype=torch.long)

    @cached_property
    def receiving(self) -> Tensor:
        """The new ids of the pieces of removed tokens, the rows that receive probability, in increasing order."""
        if self.every:
            return torch.arange(len(self.vocabulary.kept))
        pieces = self.vocabulary.pieces
        return torch.tensor(sorted({piece for old in self.removed.tolist() for piece in pieces[old]}))

    @cached_property
    def _places(self) -> dict[int, int]:
        return {piece: place for place, piece in enumerate(self.receiving.tolist())}

    @cached_property
    def _first(self) -> Tensor:
        """For each old id the place of its first piece among the receiving rows, or their number."""
        first = torch.full((self.rows,), len(self.receiving))
        for old, pieces in self.vocabulary.pieces.items():
            first[old] = self._places.get(pieces[0], len(self.receiving))
        return first

    @cached_property
    def _continued(self) -> dict[Pieces, tuple[Tensor, Tensor]]:
        """For the first pieces of removed tokens, the old ids of these tokens and the places of their next pieces."""
        found = defaultdict[Pieces, tuple[list[int], list[int]]](lambda: ([], []))
        for old in self.removed.tolist():
            pieces = self.vocabulary.pieces[old]
            for count in range(1, len(pieces)):
                tokens, following = found[pieces[:count]]
                tokens.append(old)
                following.append(self._places[pieces[count]])
        return {key: (torch.tensor(tokens), torch.tensor(following)) for key, (tokens, following) in found.items()}

    @cached_property
    def _written(self) -> dict[Pieces, list[int]]:
        """The old ids of the tokens with exactly these pieces."""
        found = defaultdict[Pieces, list[int]](list)
        for old, pieces in self.vocabulary.pieces.items():
            found[pieces].append(old)
        return found

    @cached_property
    def without_token(self) -> Tensor:
        """A mask [rows] of the embeddings that no token of the tokenizer has."""
        mask = torch.ones(self.rows, dtype=torch.bool)
        mask[list(self.vocabulary.pieces)] = False
        return mask

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the dense model's probabilities [n, rows] for its logits, none for rows without a token."""
        return logits.float().masked_fill(self.without_token.to(logits.device), -torch.inf).softmax(-1)

    def first_pieces(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities [n, receiving] of first pieces, for those of all tokens [n, rows]."""
        sums = probabilities.new_zeros(len(self.receiving) + 1, len(probabilities))
        # Sums of rows are faster than sums of columns.
        return sums.index_add_(0, self._first.to(sums.device), probabilities.t().contiguous())[:-1].t()

    def new_ids(self, old: Tensor) -> Tensor:
        """Return the pieces of old ids [n], one after the other."""
        pieces = self.vocabulary.pieces
        return torch.tensor([piece for token in old.tolist() for piece in pieces[token]])

    def old_ids(self, new: Tensor) -> Tensor:
        """Return old ids with these pieces [n]: of the tokens that can begin at a piece, the one with most pieces."""
        ids, found, place = tuple(new.tolist()), list[int](), 0
        while place < len(ids):
            token, count = self.vocabulary.kept[ids[place]], 1
            longest = self._longest.get(ids[place : place + 2], 1)
            for longer in range(min(longest, len(ids) - place), 1, -1):
                removed = self._removed_with.get(ids[place : place + longer])
                if removed is not None:
                    token, count = removed, longer
                    break
            found.append(token)
            place += count
        return torch.tensor(found)

    @cached_property
    def _removed_with(self) -> dict[Pieces, int]:
        """The old id of the removed token with exactly these pieces; of several the first."""
        pieces = self.vocabulary.pieces
        return {pieces[old]: old for old in reversed(self.removed.tolist())}

    @cached_property
    def _longest(self) -> dict[Pieces, int]:
        """The largest number of pieces of the removed tokens that begin with these two pieces."""
        found = dict[Pieces, int]()
        for pieces in self._removed_with:
            found[pieces[:2]] = max(len(pieces), found.get(pieces[:2], 0))
        return found

    def counts(self, old: Tensor) -> Tensor:
        """Return the number of pieces of each of the old ids [n]."""
        return torch.tensor([len(self.vocabulary.pieces[token]) for token in old.tolist()])

    def ends(self, old: Tensor) -> Tensor:
        """Return for each piece of old ids [n] whether it is the last one of its token."""
        last = self.counts(old).cumsum(0) - 1
        return torch.zeros(int(last[-1]) + 1, dtype=torch.bool).index_fill(0, last, True)

    def inside(self, new: Tensor) -> Tensor:
        """Return for each of the new ids [n] whether it is a piece of a removed token, and not the last one."""
        return ~self.ends(self.old_ids(new))

    def targets(self, old: Tensor, probabilities: Tensor, between: Tensor) -> Tensor:
        """Return the probabilities [pieces, receiving] of the pieces behind each piece of the tokens `old` [n].

        `probabilities` [n, rows] are the dense model's behind each token. `between` [m, rows] are its probabilities
        behind the pieces that end inside a token, if they were a text of their own.
        """
        behind, inside = self.first_pieces(probabilities), iter(self.first_pieces(between))
        found = list[Tensor]()
        for number, token in enumerate(old.tolist()):
            pieces = self.vocabulary.pieces[token]
            for count in range(1, len(pieces) + 1):
                now = behind[number] if count == len(pieces) else next(inside)
                before = None if number == 0 else probabilities[number - 1]
                found.append(now if before is None else self._with_continued(pieces[:count], before, now))
        return torch.stack(found)

    def _with_continued(self, pieces: Pieces, before: Tensor, now: Tensor) -> Tensor:
        """Return `now` [receiving], mixed with the continuations of tokens that begin with these pieces."""
        if pieces not in self._continued:
            return now
        tokens, following = (each.to(now.device) for each in self._continued[pieces])
        going_on = before[tokens]
        ended = before[self._written[pieces]].sum() if pieces in self._written else before.new_zeros(())
        whole = ended + going_on.sum()
        return (now * (ended / whole)).index_add(0, following, going_on / whole) if whole > 0 else now
