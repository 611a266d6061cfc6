"""Units change nothing: not those of inputs and weights, however large or small, and inputs of zeros are inputs too."""

import itertools

import pytest
import torch

from optprune.errors import NoSolver
from optprune.grids import Grid
from optprune.moments import DenseMoments, InputMoments
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import (
    Channels,
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.pruning import prune
from optprune.recipe import load_recipe, names
from optprune.solvers import Chain, Fista, ProximalAdmm, Random, Restore, Solver, SparseGpt, Status, solve
from optprune.solvers.inverse import entry_costs, unit_costs
from optprune.solvers.run import DEAD, answer
from tests.helpers.tiny_models import tiny_llama

# The kinds of problems below have no penalty.
OTHERS = (Fista, ProximalAdmm)
SOLVERS = {
    name: solver for name, solver in names.SOLVERS.items() if issubclass(solver, Solver) and solver not in OTHERS
}
KINDS = {
    "masked": lambda loss: MaskedLeastSquares(loss, Unstructured(64).project(_random(8, 16, 2))),
    "unstructured": lambda loss: SparseLeastSquares(loss, Unstructured(64)),
    "rows": lambda loss: SparseLeastSquares(loss, RowWise(8)),
    "2:4": lambda loss: SparseLeastSquares(loss, NM(2, 4)),
    "structured": lambda loss: StructuredLeastSquares(loss, Channels.of(16, 2), 4),
    # Scales in bfloat16 have the range of float32, so that no unit is out of reach.
    "grid": lambda loss: GridLeastSquares(loss, Grid(4, 8, scale_dtype=torch.bfloat16)),
}


def _random(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss_of(inputs, weights, fit_bias, drift):
    samples = _random(200, 16, 0) @ _random(16, 16, 3)
    dense = (samples + 0.1 * _random(200, 16, 4)) * inputs if drift else None
    moments = InputMoments.from_samples(samples * inputs, dense)
    return LayerLoss.of(_random(8, 16, 1) * weights, moments, 0.01, fit_bias=fit_bias)


# Powers of two, so that nothing but the range of the numbers differs.
@pytest.mark.parametrize(
    ("inputs", "weights"), [(2.0**-40, 1.0), (2.0**40, 1.0), (2.0**-40, 2.0**-40)], ids=["small", "large", "both"]
)
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver is not Random])
def test_no_solver_minds_the_units(name, inputs, weights):
    for kind, fit_bias, drift in [(kind, *case) for kind in KINDS for case in [(False, False), (True, True)]]:
        problem, usual = (KINDS[kind](loss_of(*units, fit_bias, drift)) for units in ((inputs, weights), (1.0, 1.0)))
        try:
            expected = solve(usual, SOLVERS[name]())
        except NoSolver:
            continue
        solution = solve(problem, SOLVERS[name]())
        assert solution.status is expected.status
        assert torch.equal(solution.value != 0, expected.value != 0), kind
        assert problem.loss.relative_error(solution.value) == pytest.approx(
            usual.loss.relative_error(expected.value), rel=1e-5
        ), kind
        if expected.certificate is not None:
            factor = (inputs * weights) ** 2
            assert solution.certificate.lower_bound == pytest.approx(
                factor * expected.certificate.lower_bound, rel=1e-5, abs=1e-7 * factor * usual.loss.constant
            )


def test_the_history_and_the_callback_are_in_the_units_of_the_problem():
    problem, values = KINDS["unstructured"](loss_of(2.0**-40, 1.0, False, False)), []
    solution = solve(problem, Chain((SparseGpt(), Restore())), callback=lambda step, value: values.append(value()))
    assert solution.history[0].objective == pytest.approx(
        problem.objective(solve(problem, SparseGpt()).value), rel=1e-9
    )
    assert problem.objective(values[-1]) == solution.objective


@pytest.mark.parametrize("name", SOLVERS)
def test_where_no_input_has_any_size_every_solver_says_so_and_is_done(name):
    """With a free bias inputs that are constant are as good as zeros."""
    accepted = 0
    for kind, fit_bias in itertools.product(KINDS, [False, True]):
        samples = torch.zeros(200, 16) + (3.0 if fit_bias else 0.0)
        loss = LayerLoss.of(_random(8, 16, 1), InputMoments.from_samples(samples), 0.01, fit_bias=fit_bias)
        problem = KINDS[kind](loss)
        try:
            solution = solve(problem, SOLVERS[name](), start=loss.weight)
        except NoSolver:
            continue
        accepted += 1
        assert solution.status is Status.CONVERGED, kind
        assert solution.notes == (DEAD,), kind
        assert solution.violation == 0, kind
        assert solution.objective == solution.certificate.lower_bound == 0, kind
        assert torch.equal(answer(problem, SOLVERS[name](), loss.weight), solution.value), kind
    assert accepted


def test_removals_cost_nothing_where_no_input_has_any_size():
    loss = LayerLoss.of(_random(8, 16, 1), InputMoments.from_samples(torch.zeros(9, 16)), 0.01)
    assert not entry_costs(loss).any()
    channels = Channels(torch.arange(16).reshape(8, 2), torch.zeros(8, dtype=torch.long))
    assert unit_costs(loss, channels).tolist() == [0.0] * 8


def test_inputs_whose_squares_have_no_digits_count_as_zeros():
    """Squares below 1e-38 are subnormal in float32; such a Gram matrix is anything but semidefinite."""
    scale, limits = torch.logspace(0, -24, 16), torch.finfo(torch.float32)
    samples = _random(200, 16, 0) @ _random(16, 16, 3) * scale
    dense = samples + 0.1 * _random(200, 16, 4) * scale
    averages = [(a.T.double() @ b.double() / 200).float() for a, b in [(samples,) * 2, (dense, samples), (dense,) * 2]]
    for moments in (
        InputMoments.from_samples(samples, dense),
        InputMoments.from_averages(
            averages[0], samples.mean(0), 200, DenseMoments(averages[1], averages[2], dense.mean(0))
        ),
    ):
        assert moments.dead.tolist() == (samples.double().square().mean(0) < limits.tiny / limits.eps).tolist()
        assert 2 < int(moments.dead.sum()) < 10
        assert not any(bool(part[..., moments.dead].any()) for part in moments.parts())
        loss = LayerLoss.of(_random(8, 16, 1), moments)
        value = solve(SparseLeastSquares(loss, RowWise(8)), SOLVERS["hard_threshold"]()).value
        assert loss.relative_error(value) < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1e-20, 0.0])
@pytest.mark.parametrize("recipe", ["alps", "alps_plus", "sparsegpt", "fistapruner", "sparse_best", "structured_best"])
def test_embeddings_of_any_size_are_pruned_like_others(recipe, scale):
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(5, 500, (2, 48), generator=generator) for _ in range(2)]
    report = prune(model, batches, load_recipe(recipe))
    assert report.sparsity_reached >= 0.2
    assert all(0 <= layer.relative_error < 1 for layer in report.layers)
    if scale == 0:
        assert all(layer.notes.count(DEAD) == 1 for layer in report.layers)
