"""Problems made of others: losses of several texts, masks that are fixed in part, and limits of rows."""

from dataclasses import replace

import cvxpy
import pytest
import torch

from optprune.errors import InputError, NoSolver
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM, PartlyFixed, RowLimits, RowWise, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares, load_problem, save_problem, to_cvxpy
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    FistaPath,
    FistaPruner,
    HardThreshold,
    Magnitude,
    RefittedSwaps,
    Restore,
    SparseGpt,
    Swaps,
    Wanda,
    solve,
)
from optprune.testing import laws, reference

ROWS, WIDTH = 3, 4


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(seed, *, tokens=30, drifted=False, fit_bias=False, damping=0.05):
    """The loss of one weight on a text of its own."""
    inputs = normal(seed, tokens, WIDTH) @ normal(seed + 50, WIDTH, WIDTH) + normal(seed + 90, WIDTH)
    dense = inputs + 0.2 * normal(seed + 70, tokens, WIDTH) if drifted else None
    # The first row counts most, so that a pattern which only counted the whole matrix would keep more of it.
    weight = normal(7, ROWS, WIDTH) * torch.tensor([[5.0], [1.0], [1.0]])
    return LayerLoss.of(weight, InputMoments.from_samples(inputs, dense), damping, fit_bias=fit_bias)


# -- several texts


@pytest.mark.parametrize("drifted", [False, True])
def test_a_mixture_is_the_weighted_sum_of_the_losses(drifted):
    losses = [loss_of(seed, drifted=drifted) for seed in range(3)]
    mixed = LayerLoss.mixture(losses, (2.0, 1.0, 1.0))
    for seed in range(5):
        weight = normal(seed, ROWS, WIDTH)
        wanted = sum(share * loss.value(weight) for share, loss in zip((0.5, 0.25, 0.25), losses, strict=True))
        assert mixed.value(weight) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("fit_bias", [False, True])
def test_shares_of_the_tokens_give_the_loss_of_the_joined_text(fit_bias):
    texts = normal(0, 30, WIDTH), normal(1, 90, WIDTH) + 2
    weight = normal(7, ROWS, WIDTH)
    parts = [LayerLoss.of(weight, InputMoments.from_samples(text), fit_bias=fit_bias) for text in texts]
    joined = LayerLoss.of(weight, InputMoments.from_samples(torch.cat(texts)), fit_bias=fit_bias)
    found = LayerLoss.mixture(parts, (0.25, 0.75))
    assert found.value(normal(3, ROWS, WIDTH)) == pytest.approx(joined.value(normal(3, ROWS, WIDTH)), rel=1e-12)


def test_losses_that_do_not_add_are_refused():
    news, code = loss_of(0), loss_of(1)
    metric = OutputMetric.from_samples(normal(4, 20, ROWS), full=True).damped(0.1)
    for other, shares, sentence in (
        (replace(code, weight=code.weight + 1), (0.5, 0.5), "of one weight"),
        (replace(code, metric=metric), (0.5, 0.5), "the same metric"),
        (replace(code, fit_bias=True), (0.5, 0.5), "the same metric and `fit_bias`"),
        (code, (1.0, 0.0), "shares above zero"),
        (code, (1.0,), "2 losses need as many shares"),
    ):
        with pytest.raises(InputError, match=sentence):
            LayerLoss.mixture([news, other], shares)


# -- masks that are fixed in part, and limits of rows

STAYS = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
STAYS[0, 1] = STAYS[1, 2] = STAYS[2, 0] = True
GOES = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
GOES[0, 0] = GOES[1, 3] = GOES[2, 3] = True

PATTERNS = {
    "unstructured": PartlyFixed(Unstructured(6), STAYS, GOES),
    "rows": PartlyFixed(RowWise(2), STAYS, GOES),
    "2:4": PartlyFixed(NM(2, 4), STAYS, GOES),
    "limits": RowLimits(6, 1, 3),
    "fixed limits": PartlyFixed(RowLimits(7, 2, 3), STAYS, GOES),
}
LAWS = (
    laws.feasible,
    laws.measured_by_the_problem,
    laws.no_worse_than_the_start,
    laws.never_below_the_reference,
)
SOLVERS = [
    Magnitude(),
    Wanda(),
    Admm(),
    HardThreshold(),
    ConjugateGradients(),
    Restore(),
    Swaps(),
    RefittedSwaps(),
    *(
        pytest.param(Chain((solver, ConjugateGradients())), marks=pytest.mark.e2e)
        for solver in (FistaPath(), FistaPruner())
    ),
]
by_pattern = pytest.mark.parametrize("name", PATTERNS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.e2e if name in ("rows", "2:4") else []) for name in PATTERNS]
)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.label)
def test_solvers_keep_the_pattern_and_are_never_below_the_optimum(solver, name):
    for seed in range(2):
        problem = SparseLeastSquares(loss_of(seed, drifted=seed == 1), PATTERNS[name])
        for law in LAWS:
            law(problem, solver)
        kept = problem.support(solve(problem, solver).value)
        assert problem.pattern.admits(kept)


@by_pattern
def test_scip_and_exhaustion_agree(name):
    problem = SparseLeastSquares(loss_of(2), PATTERNS[name])
    model = to_cvxpy(problem)
    model.program.solve(solver=cvxpy.SCIP)
    chosen = torch.from_numpy(model.choice.value > 0.5)
    assert problem.pattern.admits(chosen)
    best = pytest.approx(reference(problem).optimum, rel=1e-4)
    assert solve(problem.restrict(chosen), Restore()).objective == best
    assert model.program.value * model.unit == best


@by_pattern
def test_they_are_saved_and_loaded(name, tmp_path):
    problem = SparseLeastSquares(loss_of(0), PATTERNS[name])
    save_problem(problem, tmp_path / "layer.safetensors")
    assert load_problem(tmp_path / "layer.safetensors").fingerprint() == problem.fingerprint()


def test_a_solver_that_knows_single_patterns_refuses():
    with pytest.raises(NoSolver, match="PartlyFixed"):
        solve(SparseLeastSquares(loss_of(0), PATTERNS["rows"]), SparseGpt())


def test_what_cannot_be_kept_is_refused():
    score = normal(0, ROWS, WIDTH)
    for pattern, sentence in (
        (PartlyFixed(RowWise(1), STAYS | ~GOES, GOES), "no mask of the pattern keeps all that must stay"),
        (PartlyFixed(RowWise(4), STAYS, GOES), "nothing that must go"),
        (RowLimits(13, 0, 4), "keep 0 to 12, not 13"),
        (RowLimits(2, 1, 4), "keep 3 to 12, not 2"),
    ):
        with pytest.raises(InputError, match=sentence):
            pattern.project(score)
    with pytest.raises(InputError, match="least <= most"):
        RowLimits(4, 3, 2)


def test_a_weight_that_leaves_no_room_for_what_must_stay_is_not_feasible():
    problem = SparseLeastSquares(loss_of(0), PATTERNS["rows"])
    weight = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    weight[0, 2] = weight[0, 3] = 1
    assert problem.violation(weight) == 1  # two of two are used, and [0, 1] must stay
    weight[0, 3] = 0
    assert problem.violation(weight) == 0
    weight[0, 0] = 1
    assert problem.violation(weight) == 1  # [0, 0] must go
