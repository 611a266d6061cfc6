"""Patterns: the projection is the best admissible mask, by trying them all."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.patterns import (
    ANYWHERE,
    NETWORK,
    NM,
    InGroups,
    InRows,
    RowWise,
    SlotWise,
    Unstructured,
    largest,
    pattern_family,
)
from optprune.solvers import Admm, Magnitude, SparseGpt, Swaps, Wanda, solve
from optprune.testing import laws
from optprune.testing.strategies import PATTERNS
from tests.helpers.sparse_cases import correlated

by_kind = pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.__name__)


@by_kind
def test_projection_is_best_and_admissible(kind):
    @given(PATTERNS[kind])
    def check(drawn):
        laws.projection_is_best(*drawn)

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
    for make in (Unstructured, RowWise, lambda n: NM(n, 4)):
        with pytest.raises(InputError, match=r"cannot keep|cannot be"):
            make(keep).project(score)
    with pytest.raises(InputError, match=r"cannot keep|cannot be"):
        SlotWise(torch.zeros(4, dtype=torch.long), keep).project(score[0])


@pytest.mark.usefixtures("as_users_run")
def test_a_choice_of_units_takes_no_matrix():
    with pytest.raises(InputError, match=r"takes a score for each, not scores of the shape \[2, 4\]"):
        SlotWise(torch.zeros(4, dtype=torch.long), 2).project(torch.ones(2, 4))


def test_n_of_m_is_of_consecutive_inputs_of_a_row():
    """Of eight outputs and eight inputs, so that the other axis would do as well: groups lie within a row."""
    score = torch.zeros(8, 8)
    score[0] = torch.tensor([4.0, 3.0, 2.0, 1.0, 5.0, 6.0, 7.0, 8.0])
    score[1] = score[0] + 10
    mask = NM(2, 4).project(score)
    assert mask[:2].tolist() == [[True, True, False, False, False, False, True, True]] * 2
    assert mask[2:].tolist() == [[True, True, False, False] * 2] * 6


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_admits_groups_of_a_row_and_not_of_a_column(n, m):
    along = torch.arange(2 * m).expand(2 * m, 2 * m) % m < n
    assert NM(n, m).admits(along)
    # Every group of a column has its n, and a row all or nothing.
    assert not NM(n, m).admits(along.T.contiguous())


@pytest.mark.parametrize(
    "solver", [Magnitude(), Wanda(), SparseGpt(), Admm(), Swaps()], ids=lambda solver: solver.label
)
def test_solvers_keep_two_of_four_inputs_of_every_output(solver):
    """Of a square weight, counted out."""
    problem = correlated(0, 8, 8, "2:4")
    value = solve(problem, solver).value
    for output in range(8):
        for first in (0, 4):
            assert sum(float(value[output, first + i]) != 0 for i in range(4)) == 2
    # Not by chance in groups of outputs too.
    assert any(int((value[first : first + 4, column] != 0).sum()) != 2 for first in (0, 4) for column in range(8))


def test_nan_scores_are_an_error():
    with pytest.raises(InputError, match="NaN"):
        RowWise(1).project(torch.tensor([[1.0, torch.nan]]))


def test_n_of_m_needs_a_multiple_of_m():
    with pytest.raises(InputError, match="multiple of 4"):
        NM(2, 4).project(torch.ones(1, 6))
    assert not NM(2, 4).admits(torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize("name", ["unstructured", "rows", "1:4", "2:4", "4:8"])
@pytest.mark.parametrize("share", [0.25, 0.37, 0.5, 1.0])
def test_a_family_has_a_pattern_for_every_share_that_it_admits(name: str, share: float):
    """The count that a family tells is that of its pattern's masks, and as near to the share as the pattern can."""
    family = pattern_family(name)
    assert family.name == name and pattern_family(name) == family
    if family.only_share is not None:
        share = family.only_share
    assert family.admits(share) and family.admits(1.0)
    kept = int(family.of(6, 16, share).project(torch.rand(6, 16)).sum())
    assert kept == family.keep(6, 16, share)
    assert abs(kept - share * 96) <= {"unstructured": 0.5, "rows": 3.0}.get(name, 0.0)


def test_a_family_of_groups_admits_one_share_or_all():
    assert [share for share in (0.25, 0.5, 0.75, 1.0) if InGroups(2, 4).admits(share)] == [0.5, 1.0]
    assert all(family.admits(0.3) for family in (ANYWHERE, InRows()))


@pytest.mark.parametrize(
    "name", ["", "columns", "2:", ":4", "2:4:8", "0:4", "2:04", "-2:4", "2.0:4", "2:4 ", "9" * 5000 + ":4"]
)
def test_a_family_that_is_not_known(name: str):
    with pytest.raises(InputError, match="use unstructured, rows, or N:M such as 2:4"):
        pattern_family(name)


@pytest.mark.parametrize("name", ["4:4", "4:2"])
def test_groups_that_keep_everything(name: str):
    with pytest.raises(InputError, match=f"the pattern {name} keeps everything: N must be less than M"):
        pattern_family(name)


@pytest.mark.parametrize(
    ("inputs", "share", "each"), [(8, 0.5, 4), (10, 0.24, 2), (10, 0.28, 3), (7, 0.9, 6), (9, 0.94, 8), (8, 1.0, 8)]
)
def test_the_pattern_of_rows_keeps_the_nearest_number_in_every_row(inputs: int, share: float, each: int) -> None:
    family, score = pattern_family("rows"), torch.arange(3.0 * inputs).reshape(3, inputs)
    assert family.of(3, inputs, share).project(score).sum(1).tolist() == [each] * 3
    assert family.keep(3, inputs, share) == 3 * each


def test_every_mask_of_two_in_four_is_one_of_four_in_eight() -> None:
    """So the optimum of 4:8 is never larger than that of 2:4, which keeps as many weights."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = NM(2, 4).project(torch.randn(4, 16, generator=generator))
        assert NM(4, 8).admits(mask)
        assert int(mask.sum()) == pattern_family("4:8").keep(4, 16, 0.5) == pattern_family("2:4").keep(4, 16, 0.5)


@pytest.mark.parametrize("kind", [kind for kind in PATTERNS if kind is not SlotWise], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_the_exchanges_of_a_pattern_are_those_after_which_it_admits_the_mask(kind, data):
    pattern, score = data.draw(PATTERNS[kind])
    mask, exchanges = pattern.project(score), pattern.exchanges()
    pairs, free = exchanges.pairs(mask), exchanges.free(mask).flatten()
    for q, p in product(range(mask.numel()), repeat=2):
        if bool(mask.flatten()[p]) and not bool(mask.flatten()[q]):
            other = mask.flatten().clone()
            other[p], other[q] = False, True
            assert bool(pairs[q, p] & free[q] & free[p]) == pattern.admits(other.reshape(mask.shape))


def test_a_pattern_of_slots_knows_no_exchanges_of_single_weights():
    assert SlotWise(torch.tensor([0, 0]), 1).exchanges() is None
