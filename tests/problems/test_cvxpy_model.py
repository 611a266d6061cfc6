"""Problems as cvxpy programs: the same optimum as our solvers find, and the same feasible set."""

import sys
from dataclasses import replace

import cvxpy
import numpy as np
import pytest
import torch

import optprune
from optprune.errors import InputError
from optprune.grids import GRIDS
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM, Pattern, RowWise, Unstructured
from optprune.penalties import L1, Penalty
from optprune.problems import (
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    SparseLeastSquares,
    to_cvxpy,
)
from optprune.solvers import Admm, Chain, ChannelSwaps, ConjugateGradients, Fista, RefittedSwaps, Restore, Spap, solve
from tests.helpers.convex_cases import PENALTY_NAMES, penalty_of
from tests.helpers.structured_cases import KINDS, channels, grouped_query, structured_loss

TIGHT = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)


def with_metric(loss, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    gradients = torch.randn(40, len(loss.weight), generator=generator, dtype=torch.float64)
    return replace(loss, metric=OutputMetric.from_samples(gradients, full=seed % 2 == 0).damped(0.1))


def convex(seed):
    """One of fifty problems of restoration and with penalties, a third of them with an output metric."""
    loss = structured_loss(seed, 3, 8, KINDS[seed % 3], damping=0.05, fit_bias=seed % 4 < 2)
    loss = with_metric(loss, seed) if seed % 3 == 0 else loss
    if seed % 2:
        return PenalisedLeastSquares(loss, penalty_of(PENALTY_NAMES[seed // 2 % len(PENALTY_NAMES)], loss, 0.2))
    mask = torch.rand(3 if seed % 4 else 1, 8, generator=torch.Generator().manual_seed(seed)) < 0.6
    return MaskedLeastSquares(loss, mask)


@pytest.mark.parametrize("seed", range(50))
def test_ours_and_clarabel_agree_to_a_millionth(seed):
    problem = convex(seed)
    model = to_cvxpy(problem)
    model.program.solve(solver=cvxpy.CLARABEL, **TIGHT)
    theirs = problem.measure(model.value())
    ours = solve(problem, ConjugateGradients(tolerance=1e-9) if seed % 2 == 0 else Fista(tolerance=1e-7))
    assert theirs.violation == 0
    assert theirs.objective == pytest.approx(ours.objective, rel=1e-6)
    # And the program's own objective is the problem's.
    assert model.program.value * model.unit == pytest.approx(theirs.objective, rel=1e-6)


def entries(seed):
    """A choice of single weights, of one of three patterns."""
    loss = structured_loss(seed, 3, 4, KINDS[seed % 3], damping=0.05)
    pattern = (Unstructured(6), RowWise(2), NM(2, 4))[seed % 3]
    return SparseLeastSquares(with_metric(loss, 1) if seed % 5 == 4 else loss, pattern)


def units(seed):
    """A choice of single channels, or of the dimensions of two KV heads."""
    kind = KINDS[seed % 3]
    return grouped_query(seed, kind) if seed % 4 == 3 else channels(seed, kind, units=6, keep=3)


def optimum(problem):
    """The answer that SCIP proves to be the best, measured by the problem after its weights are refitted."""
    model = to_cvxpy(problem)
    model.program.solve(solver=cvxpy.SCIP)
    assert model.program.status == cvxpy.OPTIMAL
    assert problem.measure(model.value()).violation == 0
    chosen = torch.from_numpy(np.asarray(model.choice.value) > 0.5)
    return solve(problem.restrict(chosen), Restore()).objective


def ratios(make, solver, count):
    """The loss of a solver over what SCIP proves to be the least, for some problems."""
    problems = map(make, range(count))
    return [solve(problem, solver).objective / optimum(problem) for problem in problems]


# All twenty take SCIP most of a minute.
COUNTS = pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])


@pytest.mark.e2e
@COUNTS
def test_spap_and_exchanges_reach_the_channels_that_scip_proves_to_be_best(count):
    found = ratios(units, Chain((Spap(), ChannelSwaps(), Restore())), count)
    assert min(found) >= 1 - 1e-5
    assert sum(ratio <= 1 + 1e-5 for ratio in found) >= 0.9 * count


@pytest.mark.e2e
@COUNTS
def test_exchanges_with_a_refit_reach_the_weights_that_scip_proves_to_be_best(count):
    found = ratios(entries, Chain((Admm(), ConjugateGradients(), RefittedSwaps())), count)
    assert min(found) >= 1 - 1e-5
    assert sum(ratio <= 1 + 1e-5 for ratio in found) >= 0.9 * count


def test_scip_keeps_a_pattern_and_the_bounds_hold_its_answer():
    for problem in (entries(0), entries(4)):
        assert optimum(problem) <= problem.objective(problem.start())


# -- refusals


@pytest.fixture
def loss():
    return structured_loss(0, 2, 32, damping=0.1)


def test_a_grid_has_no_program(loss):
    with pytest.raises(InputError, match=r"a grid least squares problem has no convex or mixed-integer program"):
        to_cvxpy(GridLeastSquares(loss, GRIDS["q4_0"]))


def test_a_large_layer_is_refused_before_any_work():
    moments = InputMoments(torch.eye(300), torch.zeros(300), 1)
    large = MaskedLeastSquares(LayerLoss.of(torch.ones(300, 300), moments), torch.ones(1, 300, dtype=torch.bool))
    with pytest.raises(InputError, match=r"a layer \[300, 300\] is too large for cvxpy: .* 27,000,000 coefficients"):
        to_cvxpy(large)


def test_without_damping_a_singular_layer_has_no_bounds():
    inputs = torch.ones(8, 4, dtype=torch.float64)
    loss = LayerLoss.of(torch.ones(2, 4, dtype=torch.float64), InputMoments.from_samples(inputs))
    with pytest.raises(InputError, match="the Gram matrix is singular: damp the loss"):
        to_cvxpy(SparseLeastSquares(loss, RowWise(2)))


def test_a_penalty_or_a_pattern_of_ones_own_is_refused_by_name(loss):
    class Mine(Penalty):
        def value(self, weight):
            return 0.0

        prox = conjugate = value

    class Own(Pattern):
        def project(self, score):
            return score > 0

        def admits(self, mask):
            return True

    with pytest.raises(InputError, match="the penalty Mine has no expression of cvxpy"):
        to_cvxpy(PenalisedLeastSquares(loss, Mine()))
    with pytest.raises(InputError, match="the pattern Own has no linear constraints"):
        to_cvxpy(SparseLeastSquares(loss, Own()))


def test_an_unsolved_program_has_no_value(loss):
    with pytest.raises(InputError, match="solve it first"):
        to_cvxpy(PenalisedLeastSquares(loss, L1(0.1))).value()


def test_without_cvxpy_the_sentence_says_what_to_install(loss, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[testing\]'"):
        optprune.to_cvxpy(PenalisedLeastSquares(loss, L1(0.1)))


def test_a_weight_of_another_shape_is_not_measured(loss):
    with pytest.raises(InputError, match=r"must be \[2, 32\], not \[32, 2\]"):
        PenalisedLeastSquares(loss, L1(0.1)).measure(loss.weight.T)
