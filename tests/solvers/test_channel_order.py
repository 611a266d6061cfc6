"""The order of channels under N:M: never one that retains less, and the best there is where all can be tried."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optprune.errors import InputError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM
from optprune.problems import Channels, LayerLoss
from optprune.solvers import best_permutation, channel_order
from optprune.solvers.channel_order import TOGETHER

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def retained(scores: Tensor, order: list[int], n: int, m: int) -> float:
    """What the best mask keeps, row by row and group by group from the definition."""
    total = 0.0
    for row in scores[:, order].tolist():
        for start in range(0, len(row), m):
            total += sum(sorted(row[start : start + m])[m - n :])
    return total


def partitions(channels: list[int], m: int) -> list[list[int]]:
    """Every way to make groups of m, each once."""
    if not channels:
        return [[]]
    first, rest = channels[0], channels[1:]
    found = []
    for others in combinations(rest, m - 1):
        left = [channel for channel in rest if channel not in others]
        found += [[first, *others, *order] for order in partitions(left, m)]
    return found


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(["normal", "tied", "zero", "tiny", "huge"]),
)
def test_no_order_retains_less_than_the_one_that_was_there(
    pattern: tuple[int, int], groups: int, rows: int, seed: int, kind: str
) -> None:
    n, m = pattern
    scores = draw(rows, groups * m, seed=seed).square()
    scores = {
        "normal": scores,
        "tied": scores.round(),
        "zero": 0 * scores,
        "tiny": 1e-200 * scores,
        "huge": 1e200 * scores,
    }[kind]
    order = channel_order(scores, NM(n, m)).tolist()
    assert sorted(order) == list(range(groups * m))
    before, after = (retained(scores, found, n, m) for found in (list(range(groups * m)), order))
    assert after >= before * (1 - 1e-12)


@pytest.mark.parametrize(("n", "m", "groups"), [(1, 2, 2), (1, 2, 3), (2, 4, 2), (1, 4, 2), (3, 4, 2)])
def test_small_cases_come_near_to_the_best_of_all_orders(n: int, m: int, groups: int) -> None:
    """Of two groups of two one assignment reaches every partition. Else it is a local search: most of the way."""
    shares = []
    for seed in range(20):
        scores = draw(6, groups * m, seed=seed).square()
        found = retained(scores, channel_order(scores, NM(n, m)).tolist(), n, m)
        first = retained(scores, list(range(groups * m)), n, m)
        best = max(retained(scores, order, n, m) for order in partitions(list(range(groups * m)), m))
        assert found <= best * (1 + 1e-12)
        shares.append(1.0 if best == first else (found - first) / (best - first))
    if groups * m == 4:
        assert min(shares) > 1 - 1e-9
    assert sum(shares) / len(shares) > 0.8, shares


def test_channels_that_can_be_spared_come_to_different_groups() -> None:
    """Each group has two strong channels or none: with two in each, nothing of the strong ones is lost."""
    strong = torch.tensor([[9.0, 8, 7, 6, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).repeat(3, 1)
    order = channel_order(strong, NM(2, 4)).tolist()
    assert all(sum(channel < 4 for channel in group) == 2 for group in (order[:4], order[4:]))
    assert order[:4] == sorted(order[:4]) and order[4:] == sorted(order[4:]) and order[0] == 0


def test_where_nothing_is_gained_all_stay() -> None:
    assert channel_order(torch.ones(3, 16), NM(2, 4)).tolist() == list(range(16))
    assert channel_order(draw(3, 4).square(), NM(2, 4)).tolist() == list(range(4))


def test_wide_layers_go_by_parts() -> None:
    """More groups than exchange at a time still mix: what only groups far apart can give each other is found."""
    groups = 2 * TOGETHER
    scores = torch.full((1, 2 * groups), 0.1, dtype=torch.float64)
    scores[:, :groups] = 1.0  # the first half of the groups has two strong channels each, the others none
    order = channel_order(scores, NM(1, 2)).tolist()
    assert retained(scores, order, 1, 2) > 0.98 * groups


def test_threads_do_not_decide() -> None:
    scores, threads = draw(64, 256, seed=3).square().float(), torch.get_num_threads()
    try:
        orders = []
        for count in (1, 2):
            torch.set_num_threads(count)
            orders.append(channel_order(scores, NM(2, 4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*orders)


def test_a_width_of_no_whole_groups_is_refused() -> None:
    with pytest.raises(InputError, match="a 2:4 pattern orders a multiple of 4 channels, not 6"):
        channel_order(torch.ones(2, 6), NM(2, 4))


# -- of a layer


def heads(seed: int, slots: int = 2, size: int = 8, tied: int = 2) -> tuple[LayerLoss, Channels]:
    """Value dimensions of `slots` KV heads that `tied` query heads read, whose inputs differ in size."""
    width = slots * size * tied
    inputs = draw(80, width, seed=seed) * (1 + draw(width, seed=seed + 1).abs())
    metric = OutputMetric.from_samples(draw(40, 5, seed=seed + 3) * torch.arange(1.0, 6), full=False)
    loss = LayerLoss.of(draw(5, width, seed=seed + 2), InputMoments.from_samples(inputs), 0.01, metric=metric)
    unit = torch.arange(slots * size)
    slot = unit // size
    columns = (slot[:, None] * tied + torch.arange(tied)) * size + (unit % size)[:, None]
    return loss, Channels(columns, slot)


def lost(loss: LayerLoss, order: list[int]) -> float:
    """What a mask of 2:4 loses by the diagonal of A and of S, from the definition."""
    assert loss.metric is not None
    scale = loss.metric.average.diagonal() if loss.metric.full else loss.metric.average
    scale = scale + loss.metric.damping
    scores = scale[:, None] * loss.weight.square() * loss.moments.mean_square
    return float(scores.sum()) - retained(scores, order, 2, 4)


@pytest.mark.parametrize("seed", range(3))
def test_value_dimensions_stay_in_their_head_and_move_alike_in_all_that_read_them(seed: int) -> None:
    loss, channels = heads(seed)
    found = best_permutation(loss, channels, NM(2, 4))
    assert torch.equal(channels.slots[found.units], channels.slots)
    place = found.inputs.reshape(2, 2, 8)
    for slot in range(2):
        within = [(place[slot, tied] - (slot * 2 + tied) * 8).tolist() for tied in range(2)]
        assert within[0] == within[1] and sorted(within[0]) == list(range(8))
    assert lost(loss, found.inputs.tolist()) < 0.97 * lost(loss, list(range(32)))


def test_an_output_counts_by_the_metric() -> None:
    """Of four inputs one output reads the first two, which are in one group; four outputs want these to stay there."""
    weight = torch.full((5, 4), 0.01, dtype=torch.float64)
    for row, pair in enumerate([(0, 1), (0, 2), (0, 2), (0, 3), (0, 3)]):
        weight[row, list(pair)] = 1.0
    moments = InputMoments.from_samples(torch.eye(4, dtype=torch.float64))
    weights = torch.tensor([1e3, 1, 1, 1, 1], dtype=torch.float64)
    metric = OutputMetric.from_samples(torch.diag(weights.sqrt()), full=False)
    alike, weighed = (
        best_permutation(LayerLoss.of(weight, moments, metric=each), Channels.of(4), NM(1, 2)).units.tolist()
        for each in (None, metric)
    )
    assert alike == [0, 1, 2, 3] and weighed != alike


def test_an_input_counts_by_its_size() -> None:
    size = torch.ones(8, dtype=torch.float64)
    size[4:] = 1e3
    loss = LayerLoss.of(torch.ones(1, 8, dtype=torch.float64), InputMoments.from_samples(torch.diag(size)))
    order = best_permutation(loss, Channels.of(8), NM(2, 4)).units.tolist()
    assert sum(channel < 4 for channel in order[:4]) == 2


def test_units_that_are_no_whole_groups_are_refused() -> None:
    loss, channels = heads(0, size=6)
    with pytest.raises(InputError, match="6 units of a slot do not form whole groups of a 2:4 pattern"):
        best_permutation(loss, channels, NM(2, 4))
    shifted = Channels(channels.columns.roll(1, 0), channels.slots)
    with pytest.raises(InputError, match="do not form whole groups"):
        best_permutation(loss, shifted, NM(1, 2))
