"""The dense model's predictions, pushed forward: the pieces of a token have its probability, and nothing is lost."""

import pytest
import torch
from torch import Tensor

from optprune.tokens import PushForward, SmallerVocabulary
from tests.helpers.token_kinds import tokenizer_of

ROWS = 720
"""more than the tokenizer has"""


def push_forward() -> PushForward:
    tokenizer = tokenizer_of("merged bytes")
    kept = [*range(259), *range(259, 700, 2), 700]
    return PushForward(SmallerVocabulary.of(tokenizer, kept), ROWS)


def probabilities(push: PushForward, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return push.probabilities(3 * torch.randn(count, ROWS, generator=generator)).double()


def whole(push: PushForward, dense: Tensor) -> Tensor:
    """The push-forward on all kept tokens [n, kept], by its definition."""
    found = torch.zeros(len(dense), len(push.vocabulary.kept), dtype=torch.float64)
    for old, pieces in push.vocabulary.pieces.items():
        found[:, pieces[0]] += dense[:, old]
    return found


def test_first_pieces_sum_the_tokens_that_begin_with_them() -> None:
    push = push_forward()
    dense = probabilities(push, 4)
    assert dense[:, push.without_token].sum() == 0
    expected = whole(push, dense)
    assert torch.allclose(expected.sum(1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(push.first_pieces(dense), expected[:, push.receiving])
    others = torch.ones(len(push.vocabulary.kept), dtype=torch.bool)
    others[push.receiving] = False
    kept = torch.tensor(push.vocabulary.kept)[others]
    assert torch.allclose(expected[:, others], dense[:, kept]), "other tokens keep their probabilities"


def test_the_pieces_of_a_token_have_its_probability() -> None:
    """Where no shorter token may end inside, the product for the pieces is the sum of all tokens that begin so."""
    push = push_forward()
    written, place = push.vocabulary.pieces, {piece: row for row, piece in enumerate(push.receiving.tolist())}
    long = [old for old in push.removed.tolist() if len(written[old]) == 3]
    assert len(long) > 5
    for token in long:
        pieces, ids = written[token], torch.tensor([40, token, 41])
        dense, between = probabilities(push, 3, seed=token), probabilities(push, 2, seed=token + 1)
        begin = [old for old, other in written.items() if other[0] in pieces[1:]]
        between[:, begin] = 0
        targets = push.targets(ids, dense, between)
        assert push.new_ids(ids).tolist() == [40, *pieces, 41]
        product = torch.stack([targets[row, place[piece]] for row, piece in enumerate(pieces)]).prod()
        beginning = [old for old, other in written.items() if other[:3] == pieces]
        assert product == pytest.approx(float(dense[0, beginning].sum()), rel=1e-9)


def test_behind_a_token_longer_ones_may_go_on() -> None:
    push = push_forward()
    written, place = push.vocabulary.pieces, {piece: row for row, piece in enumerate(push.receiving.tolist())}
    longer = next(old for old in push.removed.tolist() if len(written[old]) == 2)
    token = next(old for old, other in written.items() if other == written[longer][:1])
    dense = probabilities(push, 2)
    targets = push.targets(torch.tensor([40, token]), dense, dense[:0])
    going_on = [old for old, other in written.items() if other[:1] == written[token] and len(other) > 1]
    ended = float(dense[0, token] / dense[0, [token, *going_on]].sum())
    assert 0 < ended < 1
    expected = push.first_pieces(dense[1:])[0] * ended
    for old in going_on:
        expected[place[written[old][1]]] += dense[0, old] / dense[0, [token, *going_on]].sum()
    assert torch.allclose(targets[1], expected)
    assert torch.allclose(targets[0], push.first_pieces(dense[:1])[0]), "the first token of a text has nothing before"
