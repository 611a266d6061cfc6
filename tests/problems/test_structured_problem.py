"""The structured problem: units, slots, columns of no unit; and how near the optimum cheap methods come."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.patterns import SlotWise
from optprune.problems import (
    Channels,
    LayerLoss,
    MaskedLeastSquares,
    Permutation,
    StructuredLeastSquares,
    load_problem,
    save_problem,
)
from optprune.solvers import Chain, FaspMetric, Magnitude, Random, Restore, solve
from optprune.testing import REFERENCES, reference
from optprune.testing.quadratic import rounding
from optprune.testing.references import exhaustive
from optprune.testing.strategies import structured
from optprune.testing.transformations import random_feasible
from tests.helpers.structured_cases import structured_loss


def test_groups_are_where_they_are_asked_for_whatever_the_default_device():
    with torch.device("meta"):
        groups = Channels.of(6, 3), Channels.of(6, 3, torch.device("cpu"))
    assert all(part.device.type == "cpu" for group in groups for part in (group.columns, group.slots))


def test_groups_are_cut_and_checked():
    assert Channels.of(6, 3).columns.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="cannot be cut"):
        Channels.of(6, 4)
    loss = structured_loss(0, 2, 4)
    with pytest.raises(InputError, match="but the layer has 4"):
        StructuredLeastSquares(loss, Channels.of(6), 2)
    with pytest.raises(InputError, match="cannot keep"):
        StructuredLeastSquares(loss, Channels.of(4), 0)


def problem_of(weight, keep, scales=None):
    """A structured problem of independent inputs, one column a unit, one slot."""
    width = len(weight[0])
    scales = torch.ones(width) if scales is None else torch.tensor(scales)
    moments = InputMoments(torch.diag(scales.square()), torch.zeros(width), 100)
    return StructuredLeastSquares(LayerLoss.of(torch.tensor(weight), moments), Channels.of(width), keep)


@given(structured(), st.integers(0, 5))
def test_every_restricted_choice_is_feasible_and_uses_only_its_columns(problem, seed):
    choice = problem.support(random_feasible(problem, seed))
    assert problem.pattern.admits(choice)
    gone = problem.channels.columns[~choice].reshape(-1).tolist()
    masked = problem.restrict(choice)
    assert isinstance(masked, MaskedLeastSquares)
    assert masked.loss is problem.loss
    kept = masked.mask[0].tolist()
    assert [column for column, stays in enumerate(kept) if not stays] == sorted(gone)
    pruned = problem.zero_outside(choice)
    assert problem.violation(pruned) == 0
    expected = problem.loss.weight.clone()
    expected[:, gone] = 0
    assert torch.equal(pruned, expected)


@given(structured(), st.integers(0, 5))
def test_support_contains_what_a_feasible_weight_uses(problem, seed):
    weight = random_feasible(problem, seed)
    choice = problem.support(weight)
    for unit in range(problem.channels.units):
        if bool((weight[:, problem.channels.columns[unit]] != 0).any()):
            assert choice[unit], "a used unit was left out"


@given(structured())
def test_restoring_the_support_of_the_optimum_is_the_optimum(problem):
    """The exhaustive optimum is attained by `restrict` of one of the choices, and by none is it beaten."""
    found = []
    for bits in product((False, True), repeat=problem.channels.units):
        choice = torch.tensor(bits)
        if problem.pattern.admits(choice):
            found.append(reference(problem.restrict(choice)))
    least = min(found, key=lambda best: best.optimum)
    best = exhaustive(problem)
    # Both are least squares by the same reference; only the order of sums differs.
    assert abs(least.optimum - best.optimum) <= best.rounding + least.rounding


@given(structured(), st.data())
def test_violation_counts_units_beyond_what_a_slot_may_keep(problem, data):
    weight = torch.zeros_like(problem.loss.weight)
    used = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(problem.channels.slots), max_size=100)))
    used = used[: problem.channels.units]
    for unit in used.nonzero()[:, 0].tolist():
        # One entry of one of its columns is enough to use a unit.
        weight[-1, problem.channels.columns[unit, -1]] = 1e-30
    expected = 0
    for slot in range(problem.channels.slot_count):
        expected += max(int(used[problem.channels.slots == slot].sum()) - problem.pattern.keep, 0)
    assert problem.violation(weight) == expected


def test_columns_of_no_unit_always_stay():
    moments = InputMoments(torch.eye(3), torch.zeros(3), 10)
    channels = Channels(torch.tensor([[0], [2]]), torch.zeros(2, dtype=torch.long))
    problem = StructuredLeastSquares(LayerLoss.of(torch.tensor([[1.0, 0.5, 2.0]]), moments), channels, 1)
    assert problem.start().tolist() == [[0.0, 0.5, 2.0]]
    assert channels.column_mask(torch.tensor([True, False]), 3).tolist() == [[True, True, False]]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6])
def test_support_of_a_weight_that_uses_too_much_keeps_the_largest_units_at_any_scale(scale):
    problem = problem_of([[1.0, 2.0, 4.0, 3.0]], 2)
    problem = replace(problem, loss=replace(problem.loss, weight=problem.loss.weight * scale))
    assert problem.support(problem.loss.weight).tolist() == [False, False, True, True]


def test_support_completes_a_weight_that_uses_too_little_by_the_largest_units():
    problem = problem_of([[1.0, 2.0, 4.0, 3.0]], 2)
    assert problem.support(torch.tensor([[1e-9, 0.0, 0.0, 0.0]])).tolist() == [True, False, True, False]
    assert problem.support(torch.zeros(1, 4)).tolist() == [False, False, True, True]


def test_rankings_by_hand():
    # One row: magnitude ranks by |w|, FASP by |w| times the root mean square of the input.
    problem = problem_of([[1.0, 2.0, 4.0]], 1, scales=[9.0, 4.0, 1.0])
    assert solve(problem, Magnitude()).value.tolist() == [[0.0, 0.0, 4.0]]
    assert solve(problem, FaspMetric()).value.tolist() == [[1.0, 0.0, 0.0]]
    # Sums of magnitudes against a norm: (3, 0) and (2, 2).
    two_rows = problem_of([[3.0, 2.0], [0.0, 2.0]], 1)
    assert solve(two_rows, Magnitude()).value.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert solve(two_rows, FaspMetric()).value.tolist() == [[0.0, 2.0], [0.0, 2.0]]


def test_independent_inputs_are_solved_by_the_fasp_metric_for_one_row():
    problem = problem_of([[1.0, -2.0, 4.0, 0.5]], 2, scales=[3.0, 1.0, 0.1, 1.0])
    # 1/2 sum of (w s)^2 over the dropped: 0.4^2 and 0.5^2. float32.
    assert solve(problem, FaspMetric()).objective == pytest.approx((0.16 + 0.25) / 2, rel=1e-6)
    assert reference(problem).optimum == pytest.approx((0.16 + 0.25) / 2, rel=1e-6)


def test_random_columns_differ_by_seed_and_problem_and_stay_otherwise():
    problems = [problem_of([[float(row)] * 12], 6) for row in range(1, 5)]

    def choices(seed):
        return [tuple((solve(problem, Random(seed)).value[0] != 0).tolist()) for problem in problems]

    assert choices(0) == choices(0)
    assert choices(0) != choices(1)
    # 924 choices: four equal ones would be a generator that ignores the problem.
    assert len(set(choices(0))) > 1


def fixed_set():
    """Twenty correlated layers of eight units, small enough to enumerate: always the same."""
    generator = torch.Generator().manual_seed(20)
    for _ in range(20):
        mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        inputs = torch.randn(60, 8, generator=generator, dtype=torch.float64) @ mixing
        inputs = inputs * torch.rand(8, generator=generator, dtype=torch.float64) * 2
        weight = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        yield StructuredLeastSquares(LayerLoss.of(weight, InputMoments.from_samples(inputs), 1e-2), Channels.of(8), 4)


def test_fasp_with_restoration_closes_most_of_the_way_to_the_optimum():
    shares = []
    for problem in fixed_set():
        baseline = solve(problem, Magnitude()).objective
        best = reference(problem).optimum
        answer = solve(problem, Chain((FaspMetric(), Restore()))).objective
        shares.append((baseline - answer) / (baseline - best))
    # Stated share: 80 % on average, and never behind the baseline. A floor set below what was measured on this set
    # (87 % on average, 19 % at worst) and above what is left without restoration (45 %) or with the magnitudes in
    # place of the FASP metric (56 %).
    assert sum(shares) / len(shares) >= 0.8
    assert min(shares) > 0


@pytest.mark.parametrize("keep", [0, -1, 4])
def test_an_impossible_count_is_an_input_error(keep):
    with pytest.raises(InputError, match=r"cannot keep|units to keep cannot be"):
        problem_of([[1.0, 2.0, 4.0]], keep)


def test_slots_share_equally():
    moments = InputMoments(torch.eye(4), torch.zeros(4), 10)
    loss = LayerLoss.of(torch.ones(1, 4), moments)
    channels = Channels(torch.arange(4)[:, None], torch.tensor([0, 1, 0, 1]))
    with pytest.raises(InputError, match="shared equally"):
        StructuredLeastSquares(loss, channels, 3)
    with pytest.raises(InputError, match="same number of units"):
        Channels(torch.arange(3)[:, None], torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="same column"):
        Channels(torch.tensor([[0], [0]]), torch.tensor([0, 0]))


@pytest.mark.usefixtures("as_users_run")
def test_every_unit_has_a_slot():
    columns = torch.arange(4)[:, None]
    for slots in (torch.zeros(3, dtype=torch.long), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(InputError, match=f"4 units have {len(slots)} slots"):
            Channels(columns, slots)


@pytest.mark.parametrize(("columns", "reason"), [([0, 4], "columns 0 to 4, but the layer has 4"), ([-1, 2], "-1 to 2")])
def test_the_columns_of_units_are_those_of_the_layer(columns, reason):
    loss = LayerLoss.of(torch.ones(1, 4), InputMoments(torch.eye(4), torch.zeros(4), 10))
    channels = Channels(torch.tensor(columns)[:, None], torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match=reason):
        StructuredLeastSquares(loss, channels, 1)


def test_the_exhaustive_reference_refuses_what_is_not_tiny():
    problem = problem_of([[1.0] * 20], 10)
    with pytest.raises(ValueError, match="too many"):
        REFERENCES[StructuredLeastSquares](problem)


@given(structured(), st.integers(0, 3))
def test_refitting_a_choice_attains_the_optimum_of_that_choice(problem, seed):
    start = random_feasible(problem, seed)
    solution = solve(problem, Restore(), start=start)
    best = reference(problem.restrict(problem.support(start)))
    slack = 1e-8 * abs(best.optimum) + best.rounding + rounding(problem.loss, solution.value)
    assert abs(solution.objective - best.optimum) <= slack
    # A bound for one choice is none for the best one, except where all choices cost the same.
    nothing = problem.objective(torch.zeros_like(start))
    alike = abs(nothing - problem.objective(problem.loss.weight)) <= slack + rounding(problem.loss, problem.loss.weight)
    assert solution.certificate is None or alike


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_indices_may_be_whole_numbers_of_any_size(dtype: torch.dtype, tmp_path: Path, as_users_run: None) -> None:
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    loss = LayerLoss.of(inputs[:4], InputMoments.from_samples(inputs), 0.01)
    columns, slots = torch.arange(8)[:, None], torch.arange(8) % 2
    wide = StructuredLeastSquares(loss, Channels(columns, slots), 4)
    small = StructuredLeastSquares(loss, Channels(columns.to(dtype), slots.to(dtype)), 4)
    assert small.fingerprint() == wide.fingerprint()
    assert solve(small).objective == solve(wide).objective
    save_problem(small, tmp_path / "file")
    assert load_problem(tmp_path / "file").fingerprint() == wide.fingerprint()
    order = torch.tensor([2, 1, 0, 3, 4, 5, 6, 7])
    turned = Permutation.of(order.to(dtype), small.channels, 8)
    assert turned.onto(loss.weight).equal(loss.weight[:, order])
    assert SlotWise(slots.to(dtype), 2).project(inputs[0]).sum() == 4
