"""Patterns: the projection is the best admissible mask, by trying them all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.patterns import NETWORK, NM, RowWise, SlotWise, Unstructured, largest
from optprune.testing import part_laws
from optprune.testing.strategies import PATTERNS

by_kind = pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.__name__)


@by_kind
def test_projection_is_best_and_admissible(kind):
    @given(PATTERNS[kind])
    def check(drawn):
        part_laws.projection_is_best(*drawn)

    check()


@by_kind
def test_projection_of_a_projection_is_itself(kind):
    @given(PATTERNS[kind])
    def check(drawn):
        pattern, score = drawn
        mask = pattern.project(score)
        assert mask.shape == score.shape
        assert mask.dtype == torch.bool
        assert torch.equal(pattern.project(mask.double()), mask)

    check()


@by_kind
def test_one_entry_more_or_less_is_not_admitted(kind):
    @given(PATTERNS[kind], st.data())
    def check(drawn, data):
        pattern, score = drawn
        mask = pattern.project(score)
        entry = data.draw(st.integers(0, mask.numel() - 1))
        mask.view(-1)[entry] ^= True
        assert not pattern.admits(mask)

    check()


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=2 * NETWORK), st.data())
def test_ties_go_to_the_lower_index(numbers, data):
    keep = data.draw(st.integers(0, len(numbers)))
    best = sorted(range(len(numbers)), key=lambda index: (-numbers[index], index))[:keep]
    mask = largest(torch.tensor([numbers], dtype=torch.float64), keep)[0]
    assert mask.nonzero()[:, 0].tolist() == sorted(best)


def test_infinite_scores_are_only_first_and_last():
    score = torch.tensor([[1.0, -torch.inf, torch.inf, 0.0]])
    assert RowWise(2).project(score).tolist() == [[True, False, True, False]]
    assert RowWise(3).project(score).tolist() == [[True, False, True, True]]


def test_slots_may_be_interleaved():
    pattern = SlotWise(torch.tensor([0, 1, 0, 1]), 1)
    assert pattern.project(torch.tensor([1.0, 2.0, 3.0, 1.0])).tolist() == [False, True, True, False]
    assert not pattern.admits(torch.tensor([True, False, True, False]))


@pytest.mark.parametrize("keep", [-1, 5])
def test_an_impossible_count_is_an_error(keep):
    score = torch.ones(1, 4)
    for pattern in (Unstructured(keep), RowWise(keep), NM(keep, 4)):
        with pytest.raises(InputError, match="cannot keep"):
            pattern.project(score)
    with pytest.raises(InputError, match="cannot keep"):
        SlotWise(torch.zeros(4, dtype=torch.long), keep).project(score[0])


def test_nan_scores_are_an_error():
    with pytest.raises(InputError, match="NaN"):
        RowWise(1).project(torch.tensor([[1.0, torch.nan]]))


def test_n_of_m_needs_a_multiple_of_m():
    with pytest.raises(InputError, match="multiple of 4"):
        NM(2, 4).project(torch.ones(1, 6))
    assert not NM(2, 4).admits(torch.ones(1, 6, dtype=torch.bool))
