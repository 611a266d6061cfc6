"""Restoration against references that use other algorithms, and what it says about degenerate input."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from optprune.errors import InputError, NumericalError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import RowWise
from optprune.problems import LayerLoss, MaskedLeastSquares
from optprune.problems.quadratic import Quadratic
from optprune.solvers import ConjugateGradients, Restore, Status, solve
from optprune.solvers.restore import SINGULAR
from optprune.solvers.run import DEAD, answer
from optprune.solvers.spectrum import ScaledGram
from optprune.solvers.verified import VerifiedLoss
from optprune.testing import check_solver, convex_optimum, reference
from optprune.testing.quadratic import clearly_regular, exact_objective, rounding
from optprune.testing.strategies import masked
from tests.helpers.barely_apart import barely_apart
from tests.helpers.faults import noticed, one_scale_for_all


def slack(problem, solution, relative):
    """A share of the optimum. Near a zero optimum the digits of the loss constant decide: its rounding is added."""
    best = reference(problem)
    return relative * abs(best.optimum) + best.rounding + rounding(problem.loss, solution.value)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32], ids=str)
def test_equals_least_squares(dtype, relative, factor_dtype):
    # A float32 factor is only promised for what a float32 problem needs.
    if factor_dtype == torch.float32 and dtype == torch.float64:
        relative = None

    @given(masked(dtype=dtype, generic=relative is None))
    def check(problem):
        solution = solve(problem, Restore(factor_dtype))
        error = abs(solution.objective - reference(problem).optimum)
        # A step by float32 factors on a well-conditioned problem is wrong by 1e-5, its objective by the square.
        allowed = slack(problem, solution, 1e-8 if relative is None else relative)
        if relative is None:
            allowed += 1e-8 * Quadratic.of(problem.loss).terms(problem.loss.weight.numpy())
        assert error <= allowed
        assert solution.status is Status.CONVERGED
        assert solution.violation == 0

    check()


@given(masked())
def test_equals_the_convex_program(problem):
    solution = solve(problem, Restore())
    # Clarabel stops at a relative gap of 1e-8 of an objective in units of the loss's own terms; a hundred times that
    # leaves room for rank-deficient programs, which it solves to reduced accuracy.
    allowed = 1e-6 * Quadratic.of(problem.loss).terms(problem.loss.weight.numpy())
    assert abs(solution.objective - convex_optimum(problem)) <= allowed


@given(masked())
def test_the_gap_is_closed_up_to_rounding_where_the_gram_is_regular(problem):
    solution = solve(problem, Restore())
    if not clearly_regular(problem.loss):
        # Nothing need be proved, and what is, holds.
        assert solution.gap is None or solution.gap >= 0
        return
    bound = solution.certificate.lower_bound
    assert 0 <= bound <= exact_objective(problem, solution.value)
    # The proof takes off what every product and sum may round, which is a multiple of float64's step of the terms.
    terms = Quadratic.of(problem.loss).terms(problem.loss.weight.numpy())
    rounded = 1e3 * problem.loss.weight.shape[1] * np.finfo(np.float64).eps * terms
    assert solution.objective - bound <= slack(problem, solution, 1e-8) + rounded
    assert solution.gap >= 0


def test_nothing_is_proved_of_inputs_that_are_the_same():
    """A direction that costs nothing has a cost of rounding, of either sign, along which weights may be of any size."""
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 3] = inputs[:, 2]
    loss = LayerLoss.of(torch.ones(2, 4), InputMoments.from_samples(inputs))
    solution = solve(MaskedLeastSquares(loss, torch.tensor([[True, False, True, True]])), Restore())
    assert solution.notes == (SINGULAR,)
    assert solution.certificate is None and solution.gap is None


@given(masked(generic=True))
def test_the_residual_of_the_normal_equations_is_zero_on_the_mask(problem):
    value = solve(problem, Restore()).value
    residual = torch.where(problem.mask, problem.loss.gradient(value), 0.0)
    # Well-conditioned float64 systems of at most 7 unknowns.
    assert float(residual.abs().max()) <= 1e-10 * (1 + float(problem.loss.target.abs().max()))


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(masked())
def test_a_shared_mask_and_the_same_mask_for_every_row_are_one_problem(problem):
    shared = replace(problem, mask=problem.mask[:1])
    spread = replace(problem, mask=problem.mask[:1].expand(problem.loss.weight.shape).clone())
    one, other = solve(shared, Restore()), solve(spread, Restore())
    assert abs(one.objective - other.objective) <= slack(shared, one, 1e-8)


def problem_of(gram, weight, mask, damping=0.0, tokens=10):
    moments = InputMoments(torch.tensor(gram), torch.zeros(len(gram), dtype=torch.tensor(gram).dtype), tokens)
    return MaskedLeastSquares(LayerLoss.of(torch.tensor(weight), moments, damping), torch.tensor(mask))


def test_by_hand():
    # x2 = x1 / 2 + noise: dropping x2 is made up for by half its weight on x1. f = 1/2 (1 - 1/4) 2^2.
    problem = problem_of([[1.0, 0.5], [0.5, 1.0]], [[3.0, 2.0]], [[True, False]])
    solution = solve(problem, Restore())
    assert solution.value.tolist() == [[4.0, 0.0]]
    assert solution.objective == pytest.approx(1.5, rel=1e-7)
    assert solution.notes == ()


@pytest.mark.parametrize("mask", [[[True, True, False]], [[True, True, False], [True, False, True]]])
def test_a_singular_gram_without_damping_is_noted_and_the_nearest_minimiser_taken(mask):
    # The first two inputs are the same, and the third is their half plus something of its own.
    gram = [[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]]
    problem = problem_of(gram, [[1.0, 3.0, 2.0], [0.0, 0.0, 2.0]], mask)
    solution = solve(problem, Restore())
    assert solution.notes == (SINGULAR,)
    # Both take half of what the third leaves: the change nearest to none. (float32 eigenvectors.)
    assert torch.allclose(solution.value[0], torch.tensor([1.5, 3.5, 0.0]), atol=1e-5)
    damped = solve(replace(problem, loss=problem.loss.damped(1e-3)), Restore())
    assert damped.notes == ()


@given(masked())
def test_notes_are_given_exactly_where_a_kept_block_is_clearly_singular_or_clearly_not(problem):
    notes = solve(problem, Restore()).notes
    gram = Quadratic.of(problem.loss).gram
    ratios = [1.0]
    for row in np.unique(problem.mask.numpy(), axis=0):
        if row.any():
            values = np.linalg.eigvalsh(gram[np.ix_(row, row)])
            ratios.append(values[0] / values[-1] if values[-1] > 0 else 0.0)
    # Two wide bands on either side of the rounding of float64; between them either answer is right.
    if min(ratios) > 1e-12:
        assert notes == ()
    if bool((problem.loss.damping == 0).all()) and min(ratios) < 1e-17 and not problem.loss.fit_bias:
        assert notes == (SINGULAR,)


def test_too_few_tokens_without_damping_are_noted():
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = LayerLoss.of(torch.ones(2, 6), InputMoments.from_samples(inputs))
    mask = torch.tensor([[True, True, True, True, False, True]])
    assert solve(MaskedLeastSquares(loss, mask), Restore()).notes == (SINGULAR,)
    assert solve(MaskedLeastSquares(loss.damped(1e-2), mask), Restore()).notes == ()


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1.0, 1e8, 1e16])
def test_rows_that_keep_different_counts_are_not_singular_at_any_scale(scale):
    # The shorter systems are padded; the padding must be of the size of the system.
    gram = (scale * torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)).tolist()
    moments = InputMoments(torch.tensor(gram, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 10)
    loss = LayerLoss.of(torch.tensor([[3.0, 2.0], [1.0, 1.0]]), moments)
    solution = solve(MaskedLeastSquares(loss, torch.tensor([[True, False], [True, True]])), Restore())
    assert solution.notes == ()
    assert torch.allclose(solution.value, torch.tensor([[4.0, 0.0], [1.0, 1.0]], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("damping", [1e-10, 1e-8])
def test_damping_below_the_rounding_of_the_gram_is_no_licence_to_invert_noise(damping):
    # Half as many tokens as inputs, float32: the null space of the Gram matrix holds rounding of either sign.
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        inputs = torch.randn(20, 40, generator=generator)
        drifted = inputs + 0.3 * torch.randn(20, 40, generator=generator)
        moments = InputMoments.from_samples(inputs, drifted)
        loss = LayerLoss.of(torch.randn(4, 40, generator=generator), moments, damping)
        problem = MaskedLeastSquares(loss, torch.rand(1, 40, generator=generator) < 0.75)
        solution = solve(problem, Restore())
        undamped = solve(replace(problem, loss=loss.damped(0.0)), Restore())
        assert solution.notes == (SINGULAR,)
        # Nearly the undamped answer, which takes the same fallback with a stricter cut; inverted noise is far
        # larger.
        assert float(solution.value.norm()) <= 10 * float(undamped.value.norm())


def small_copies(mask):
    """float32, undamped: eight inputs, and a noisy copy of each that is a thousand times smaller; well conditioned."""
    generator = torch.Generator().manual_seed(1)
    large, noise = (torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = InputMoments.from_samples(torch.cat([large, 1e-3 * (large + 0.3 * noise)], 1)).to(torch.float32)
    return MaskedLeastSquares(LayerLoss.of(torch.randn(3, 16, generator=generator), moments), mask)


def normal_equations(problem):
    """The float64 solution of the normal equations, row by row."""
    gram, target = problem.loss.gram.double(), problem.loss.target.double()
    value = torch.zeros_like(target)
    for row, kept in enumerate(problem.mask.expand(target.shape)):
        value[row, kept] = torch.linalg.solve(gram[kept][:, kept], target[row, kept])
    return value


FIRST_FOUR_GONE = (torch.arange(16) >= 4)[None]
TEN_OF_EACH_ROW = RowWise(10).project(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("mask", [FIRST_FOUR_GONE, TEN_OF_EACH_ROW], ids=["shared", "own"])
def test_small_inputs_are_no_rounding_of_large_ones(mask):
    problem = small_copies(mask)
    solution, best = solve(problem, Restore()), problem.objective(normal_equations(problem))
    assert solution.notes == ()
    assert solution.objective == pytest.approx(best, rel=1e-4)
    assert solution.certificate.lower_bound <= best * (1 + 1e-4)
    assert solution.gap < 1e-4


@pytest.mark.parametrize("mask", [[[True, True, False, True]], [[True, True, False, True], [True, True, True, True]]])
def test_of_many_minimisers_the_one_taken_depends_on_no_unit_and_dead_inputs_stay(mask):
    # The first two inputs are the same but for the unit, the third is half of the first and something else.
    unit = torch.tensor([1.0, 2.0**-10, 2.0**5, 1.0], dtype=torch.float64)
    gram = torch.tensor([[1.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.5, 0.0], [0.5, 0.5, 1.0, 0.0], [0.0] * 4]).double()
    weight = torch.tensor([[1.0, 3.0, 2.0, 7.0], [0.0, 0.0, 2.0, 7.0]]).double()
    problem = problem_of((gram * torch.outer(unit, unit)).tolist(), (weight / unit).tolist(), mask)
    for dtype in (torch.float64, torch.float32):
        loss = LayerLoss.of(problem.loss.weight, problem.loss.moments.to(dtype))
        solution = solve(replace(problem, loss=loss), Restore())
        assert solution.notes == (SINGULAR,)
        # Both take half of what the third leaves, each in its unit.
        assert torch.allclose(solution.value[0].double() * unit, torch.tensor([1.5, 3.5, 0.0, 7.0]).double(), rtol=1e-5)
        assert float(solution.value[0, 3]) == 7


@pytest.mark.parametrize("rows", [1, 2])
def test_what_the_pseudo_inverse_leaves_is_not_proved_to_be_optimal(rows):
    loss = barely_apart()
    loss = replace(loss, weight=loss.weight.expand(rows, 2).contiguous())
    problem = MaskedLeastSquares(loss, torch.ones(rows, 2, dtype=torch.bool))
    solution, better = solve(problem, Restore()), problem.objective(normal_equations(problem))
    assert solution.notes == (SINGULAR,)
    # What a certificate that counts dropped directions as zero would claim to be impossible.
    assert better < solution.objective - 100 * rounding(loss, solution.value)
    assert solution.certificate.lower_bound <= better
    assert solution.gap > 0.1
    # Nor is a start that knew better made worse.
    start = normal_equations(problem).float()
    again = solve(problem, Restore(), start=start)
    assert torch.equal(again.value, start)
    assert again.gap < 1e-4


def test_rows_that_depend_on_each_other_need_a_proof_for_all_of_their_inputs():
    """A has a negative eigenvalue within rounding, and is positive on each mask but not on both together."""
    direction = torch.full((3,), 3**-0.5, dtype=torch.float64)
    gram = torch.eye(3, dtype=torch.float64) - (1 + 1e-6) * torch.outer(direction, direction)
    zeros, damping = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1e-12, dtype=torch.float64)
    metric = OutputMetric(torch.tensor([[1, 1 - 1e-8], [1 - 1e-8, 1]], dtype=torch.float64), zeros[:2], 100)
    weight = torch.tensor([[1, 2, 5], [0.5, -1, 3]], dtype=torch.float64)
    loss = LayerLoss(weight, InputMoments.from_averages(gram, zeros, 100), damping, metric=metric)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    problem = MaskedLeastSquares(loss, mask)
    # The gradient vanishes on the mask at this weight, which is no minimiser: the loss falls along the mask itself.
    hessian, kept = torch.kron(metric.average, gram + damping.diag()), mask.flatten()
    stationary = torch.zeros(6, dtype=torch.float64)
    stationary[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight.flatten())[kept])
    found = solve(problem, ConjugateGradients(), start=stationary.reshape(2, 3))
    lower = problem.objective(found.value + 100 * mask)
    assert lower < 0.1 * found.objective
    assert found.certificate is None or found.certificate.lower_bound <= lower


def test_an_inner_step_measures_and_proves_nothing(monkeypatch):
    loss = barely_apart()
    loss = replace(loss, damping=torch.full_like(loss.damping, 0.1))
    problem = MaskedLeastSquares(loss, torch.tensor([[True, False]]))
    expected = solve(problem, Restore())
    assert expected.certificate is not None

    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(LayerLoss, "value", refuse)
    monkeypatch.setattr(VerifiedLoss, "of", refuse)
    assert torch.equal(answer(problem, Restore(), problem.start()), expected.value)


@pytest.fixture
def three_rows_at_once(monkeypatch):
    """Of at most eight kept inputs in float64."""
    monkeypatch.setattr("optprune.solvers.restore.BATCH_BYTES", 3 * 8 * 8 * 8)


def test_rows_of_every_batch_are_solved(three_rows_at_once):
    """Eleven rows that keep 8, 0, 1, 3, ... inputs: the last batch is not full, and undamped bounds take a step too."""
    generator = torch.Generator().manual_seed(2)
    inputs, dense = (torch.randn(50, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(11, 10, generator=generator)
    kept = torch.tensor([8, 0, 1, 3, 8, 2, 5, 4, 7, 6, 1])
    mask = torch.rand(11, 10, generator=generator).argsort(1) < kept[:, None]
    for damping in (0.0, 0.1):
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs, inputs + 0.3 * dense), damping)
        problem = MaskedLeastSquares(loss, mask)
        solution = solve(problem, Restore())
        # Well-conditioned float64 systems of at most 8 unknowns.
        assert torch.allclose(solution.value, normal_equations(problem), rtol=1e-10, atol=1e-12)
        assert solution.violation == 0 and solution.notes == ()
        assert solution.certificate.lower_bound == pytest.approx(solution.objective, rel=1e-9)


def test_a_singular_row_of_any_batch_is_noted(three_rows_at_once):
    """The last two inputs are the same; one row of eight keeps both."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    inputs[:, 8] = inputs[:, 7]
    loss = LayerLoss.of(torch.randn(8, 9, generator=generator), InputMoments.from_samples(inputs))
    for row in (0, 4, 7):
        mask = torch.ones(8, 9, dtype=torch.bool)
        mask[:, 8] = False
        mask[row, :] = torch.arange(9) > 0
        solution = solve(MaskedLeastSquares(loss, mask), Restore())
        assert solution.notes == (SINGULAR,)
        others = torch.arange(8) != row
        assert torch.allclose(
            solution.value[others], normal_equations(solved_rows(loss, mask, others)), rtol=1e-10, atol=1e-12
        )


def solved_rows(loss, mask, rows):
    return MaskedLeastSquares(replace(loss, weight=loss.weight[rows]), mask[rows])


def test_rows_with_singular_blocks_share_one_decomposition(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    loss = LayerLoss.of(torch.randn(40, 12, generator=generator), InputMoments.from_samples(inputs))
    mask = torch.rand(40, 12, generator=generator) < 0.6
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or eigh(matrix))
    solution = solve(MaskedLeastSquares(loss, mask), Restore())
    assert solution.notes == (SINGULAR,)
    # Nothing is proved of blocks that cannot be told from singular ones.
    assert len(calls) == 1 and solution.certificate is None
    alone = [solve(MaskedLeastSquares(_one(loss, row), mask[row : row + 1]), Restore()).value for row in range(40)]
    assert torch.allclose(solution.value, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_no_block_with_fewer_tokens_than_inputs_is_regular():
    """A pivot may be any number of times the least eigenvalue: pivots up to 1e-9 were seen for eigenvalues of 1e-16."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        inputs = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        inputs = inputs @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
        gram = ScaledGram.of(LayerLoss.of(torch.ones(1, 12), InputMoments.from_samples(inputs)))
        kept = torch.tensor(list(combinations(range(12), 6)))
        _, regular = gram.factorised(gram.matrix[kept[:, :, None], kept[:, None, :]])
        assert not regular.any()
        # Nor one at a time.
        assert not any(bool(gram.factorised(gram.matrix[one[:, None], one])[1]) for one in kept[:20])


def _one(loss, row):
    return replace(loss, weight=loss.weight[row : row + 1])


@pytest.mark.e2e
def test_float32_factors_promise_nothing_and_do_not_invert_their_own_rounding():
    solver = Restore(torch.float32)
    # A float64 Gram matrix of rank one, whose float32 decomposition has eigenvalues of 1e-8 in place of zeros.
    side = torch.tensor([0.12, -1.43, 0.7], dtype=torch.float64)
    for scale in (1.0, 2.0**-30):
        moments = InputMoments(scale**2 * torch.outer(side, side), 0 * side, 10)
        loss = LayerLoss.of(torch.tensor([[1.5, -0.3, -2.2]]), moments)
        problem = MaskedLeastSquares(loss, torch.tensor([[True, True, False]]))
        assert not solver.exact(problem)
        assert not solver.monotone(problem)
        # The optimum is zero; a step in float32 leaves its rounding, squared.
        solution = solve(problem, solver)
        assert solution.objective <= 1e-12 * problem.objective(problem.start())
    check_solver(solver, examples=20, shrink=False)


def test_nothing_kept_and_everything_kept():
    gram, weight = [[1.0, 0.5], [0.5, 1.0]], [[3.0, 2.0]]
    nothing = solve(problem_of(gram, weight, [[False, False]]), Restore())
    assert nothing.value.tolist() == [[0.0, 0.0]]
    everything = solve(problem_of(gram, weight, [[True, True]]), Restore())
    assert everything.value.tolist() == weight
    assert everything.objective == 0
    assert everything.gap == 0


def test_all_inputs_dead():
    solution = solve(problem_of([[0.0, 0.0], [0.0, 0.0]], [[3.0, 2.0]], [[True, False]]), Restore())
    assert solution.value.tolist() == [[3.0, 0.0]]
    assert solution.objective == 0
    assert solution.notes == (DEAD,)


def test_a_gap_next_to_a_zero_objective_is_no_division_by_zero():
    gram = torch.ones(2, 2, dtype=torch.float64) * 0.1
    problem = problem_of(gram.tolist(), [[3.0, 0.3]], [[True, False]])
    assert solve(problem, Restore()).gap >= 0


def test_nan_in_the_gram_is_a_numerical_error():
    with pytest.raises(NumericalError, match="NaN"):
        problem_of([[1.0, float("nan")], [float("nan"), 1.0]], [[3.0, 2.0]], [[True, False]])


def test_negative_damping_is_an_input_error():
    with pytest.raises(InputError, match="negative"):
        problem_of([[1.0, 0.5], [0.5, 1.0]], [[3.0, 2.0]], [[True, False]], -0.1)


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 1)])
def test_a_mask_of_another_shape_is_an_input_error(shape, as_users_run):
    with pytest.raises(InputError, match="mask"):
        problem_of([[1.0, 0.5], [0.5, 1.0]], [[3.0, 2.0]], torch.ones(shape, dtype=torch.bool).tolist())


def test_violation_counts_the_entries_outside_the_mask():
    problem = problem_of([[1.0, 0.0], [0.0, 1.0]], [[3.0, 2.0], [1.0, 1.0]], [[True, False]])
    assert problem.violation(problem.loss.weight) == 2
    assert problem.violation(problem.start()) == 0
    assert problem.start().tolist() == [[3.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("mask", [FIRST_FOUR_GONE, FIRST_FOUR_GONE.expand(3, 16).clone()], ids=["shared", "own"])
def test_one_scale_for_all_inputs_is_noticed(mask, monkeypatch):
    check = partial(test_small_inputs_are_no_rounding_of_large_ones, mask)
    noticed(monkeypatch, LayerLoss, "input_scale", property(one_scale_for_all), check)
