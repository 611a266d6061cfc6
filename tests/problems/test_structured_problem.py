"""The structured problem: its groups of columns, and that it is what a linked one asks of its consumer."""

import pytest
import torch
from hypothesis import given

from optprune.errors import InputError
from optprune.problems import ChannelGroups, StructuredLeastSquares
from optprune.solvers import (
    ChannelSwaps,
    GreedyObs,
    Magnitude,
    Spap,
    solve,
)
from optprune.testing.strategies import linked
from tests.helpers.structured_cases import structured_loss


def test_groups_are_where_they_are_asked_for_whatever_the_default_device():
    with torch.device("meta"):
        groups = ChannelGroups.of(6, 3), ChannelGroups.of(6, 3, torch.device("cpu"))
    assert all(part.device.type == "cpu" for group in groups for part in (group.columns, group.slots))


def test_groups_are_cut_and_checked():
    assert ChannelGroups.of(6, 3).columns.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="cannot be cut"):
        ChannelGroups.of(6, 4)
    loss = structured_loss(0, 2, 4)
    with pytest.raises(InputError, match="but the layer has 4"):
        StructuredLeastSquares(loss, ChannelGroups.of(6), 2)
    with pytest.raises(InputError, match="cannot keep"):
        StructuredLeastSquares(loss, ChannelGroups.of(4), 0)


@pytest.mark.e2e
@given(linked())
def test_a_linked_problem_is_the_structured_one_of_its_consumer(problem):
    groups = ChannelGroups(problem.link.columns, problem.link.slots)
    other = StructuredLeastSquares(problem.loss, groups, problem.keep)
    for solver in (Magnitude(), GreedyObs(), Spap(depth=1, walk=2), ChannelSwaps()):
        assert torch.equal(solve(problem, solver).value, solve(other, solver).value)
