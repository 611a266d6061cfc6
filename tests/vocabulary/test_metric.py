"""The output metric, and the loss that it weighs: averages, damping, and the exact Kronecker quadratic form."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError, NumericalError
from optprune.metric import MetricSums, OutputMetric, clipped
from optprune.moments import InputMoments
from optprune.patterns import RowWise, Unstructured
from optprune.problems import Channels, LayerLoss, MaskedLeastSquares, SparseLeastSquares, StructuredLeastSquares
from optprune.solvers import Admm, ConjugateGradients, Magnitude, Restore, Wanda, choose, solve
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import losses, metrics, samples, weights
from tests.helpers.faults import noticed

KINDS = st.sampled_from(("diagonal", "full"))


@st.composite
def weighed(draw, *, generic=False):
    """A loss with a metric, the same loss without, and some other weight."""
    plain = draw(losses(generic=generic))
    rows, width = plain.weight.shape
    metric = draw(metrics(rows, draw(KINDS), generic=generic))
    return replace(plain, metric=metric), plain, draw(weights(width, rows=rows, generic=generic))


# -- the metric


@given(st.integers(1, 6).flatmap(samples), st.integers(1, 4))
def test_it_is_the_average_over_tokens_however_they_come(drawn, size):
    gradients = drawn.inputs
    exact = torch.einsum("ti,tj->ij", gradients, gradients) / len(gradients)
    for full in (True, False):
        sums = MetricSums(gradients.shape[1], gradients, full=full)
        for part in gradients.split(size):
            sums.add(part[None])
        found = sums.metric()
        assert found.tokens == len(gradients)
        expected = exact if full else exact.diagonal()
        # Sums of at most 40 products of numbers below about 10.
        assert torch.allclose(found.average, expected, rtol=1e-13, atol=1e-12)
        assert torch.allclose(OutputMetric.from_samples(gradients, full=full).average, found.average, atol=1e-12)


@given(samples(3), st.booleans())
def test_merged_metrics_are_those_of_one_pass(drawn, full):
    gradients = drawn.inputs
    if len(gradients) > 1:
        first, second = (OutputMetric.from_samples(part, full=full) for part in (gradients[:1], gradients[1:]))
        merged, whole = first.damped(0.5).merge(second), OutputMetric.from_samples(gradients, full=full)
        assert merged.tokens == whole.tokens
        assert torch.allclose(merged.average, whole.average, rtol=1e-12, atol=1e-12)
        assert not merged.damping.any()


def test_long_gradients_are_shortened_to_medians_of_their_own_sequence():
    lengths = torch.tensor([[1.0, 2.0, 3.0, 100.0, 0.0], [10.0, 10.0, 10.0, 1000.0, 50.0]])
    gradients = lengths[..., None] * torch.tensor([0.6, -0.8])
    found = clipped(gradients, 4.0)
    # The medians are 2.5, as a token without a gradient does not count, and 10.
    expected = torch.tensor([[1.0, 2.0, 3.0, 10.0, 0.0], [10.0, 10.0, 10.0, 40.0, 40.0]])
    torch.testing.assert_close(found, expected[..., None] * torch.tensor([0.6, -0.8]))
    assert found[0, :3].equal(gradients[0, :3])
    assert clipped(gradients, None).equal(gradients)
    for nothing in (torch.zeros(2, 3), torch.zeros(0, 3)):
        assert clipped(nothing, 1.0).equal(nothing)


@given(st.integers(1, 4).flatmap(samples), st.floats(0.1, 10))
def test_shortened_gradients_keep_their_direction(drawn, clip):
    gradients = drawn.inputs
    found, norms = clipped(gradients, clip), gradients.norm(dim=-1)
    if not bool(norms.any()):
        return
    limit = clip * norms[norms > 0].quantile(0.5)
    rounded = 1e-12 * norms.max()
    assert bool((found.norm(dim=-1) <= limit + rounded).all())
    # Each is a multiple of what it was: the cross products of the two vectors vanish.
    cross = found[:, :, None] * gradients[:, None, :]
    assert torch.allclose(cross, cross.mT, atol=float(1e-12 * norms.max() ** 2))
    short = norms <= limit * (1 - 1e-12)
    assert found[short].equal(gradients[short])


def test_damaged_gradients_stay_visible():
    gradients = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [2.0, 0.0], [math.inf, 0.0]])
    assert not bool(torch.isfinite(clipped(gradients, 1.0)[[1, 3]]).all(1).any())


def test_damping_is_a_fraction_of_the_mean_diagonal_and_replaces_itself():
    for full in (True, False):
        metric = OutputMetric.from_samples(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), full=full).damped(3.0).damped(0.5)
        # E g^2 = (2, 8), mean 5, half of it.
        assert metric.damping.tolist() == [2.5, 2.5]
        assert metric.diagonal.tolist() == [4.5, 10.5]
        assert metric.matrix.diagonal().tolist() == [4.5, 10.5]


@given(st.integers(1, 4), KINDS, st.data())
def test_applying_it_is_the_product_with_its_matrix(width, kind, data):
    metric = data.draw(metrics(width, kind))
    change = data.draw(weights(3, rows=width))
    assert torch.allclose(metric.apply(change), metric.matrix @ change, rtol=1e-12, atol=1e-12)
    assert torch.allclose(metric.only_diagonal().matrix, torch.diag(metric.matrix.diagonal()), rtol=1e-12)


@given(st.integers(1, 4), KINDS, st.data())
def test_what_is_left_after_scaling_the_rows_has_a_unit_diagonal(width, kind, data):
    metric = data.draw(metrics(width, kind))
    scaled = metric.row_scaled()
    if kind == "diagonal":
        assert scaled is None
    else:
        scale = metric.row_scale
        expected = torch.where(metric.diagonal > 0, 1.0, 0.0).double()
        assert torch.allclose(scaled.diagonal, expected, rtol=1e-12)
        assert torch.allclose(scaled.matrix * torch.outer(scale, scale), metric.matrix, rtol=1e-12)


@pytest.mark.parametrize("full", [True, False])
def test_damaged_metrics_are_refused(full):
    good = OutputMetric.from_samples(torch.eye(2), full=full)
    good.check()
    for bad, message in ((torch.nan, "NaN"), (torch.inf, "NaN"), (-1.0, "negative")):
        average = good.average.clone()
        average.view(-1)[0] = bad
        with pytest.raises(NumericalError, match=message):
            replace(good, average=average).check()
    with pytest.raises(NumericalError, match="not symmetric"):
        OutputMetric(torch.tensor([[1.0, 0.5], [0.4, 1.0]]), torch.zeros(2), 2).check()
    with pytest.raises(InputError, match="damping"):
        good.damped(-1.0)
    with pytest.raises(InputError, match="no tokens"):
        MetricSums(2, torch.zeros(1), full=full).metric()
    with pytest.raises(InputError, match="cannot be merged"):
        good.merge(OutputMetric.from_samples(torch.eye(2), full=not full))


def test_a_metric_must_fit_its_layer(as_users_run):
    loss = LayerLoss.of(torch.ones(1, 2), InputMoments.from_samples(torch.eye(2)))
    with pytest.raises(InputError, match="1 outputs needs a metric"):
        replace(loss, metric=OutputMetric.from_samples(torch.eye(2)))
    with pytest.raises(NumericalError, match="NaN"):
        replace(loss, metric=OutputMetric.from_samples(torch.tensor([[torch.nan]])))


# -- the loss


@given(samples(), st.data())
def test_the_loss_is_the_mean_over_samples_of_the_weighed_square(drawn, data):
    """f(V) = 1/2 E (V x* - W x + b)^T S (V x* - W x + b) + the ridge, S weighing both."""
    weight = data.draw(weights(drawn.inputs.shape[1]))
    other = data.draw(weights(drawn.inputs.shape[1], rows=len(weight)))
    metric = data.draw(metrics(len(weight), data.draw(KINDS)))
    fit_bias = data.draw(st.booleans())
    loss = LayerLoss.of(
        weight, drawn.moments(), data.draw(st.sampled_from((0.0, 0.1))), fit_bias=fit_bias, metric=metric
    )
    ideal = drawn.inputs if drawn.dense is None else drawn.dense
    error = drawn.inputs @ other.T - ideal @ weight.T + (loss.bias_change(other) if fit_bias else 0)
    literal = float(((error @ metric.matrix) * error).sum(1).mean()) / 2
    change = other - weight
    literal += float(torch.trace(metric.matrix @ change @ torch.diag(loss.damping) @ change.T)) / 2
    assert abs(loss.value(other) - literal) <= 1e-12 * literal + rounding(loss, other)


@given(weighed())
def test_the_loss_is_the_dense_kronecker_form(drawn):
    """1/2 v^T (S (x) A) v - v^T vec(S B) + c/2 with v the rows of V one after another."""
    loss, _, other = drawn
    matrix, v = loss.metric.matrix, other.reshape(-1)
    quadratic = float(v @ torch.kron(matrix, loss.gram) @ v) / 2 - float(v @ (matrix @ loss.target).reshape(-1))
    assert abs(loss.value(other) - quadratic - loss.constant / 2) <= rounding(loss, other)
    assert torch.allclose(loss.linear, -loss.gradient(torch.zeros_like(other)), rtol=1e-9, atol=1e-9)


@given(weighed())
def test_the_gradient_is_the_slope(drawn):
    loss, plain, at = drawn
    towards = loss.weight + torch.ones_like(at)
    slope = (loss.value(at + towards) - loss.value(at - towards)) / 2
    slack = rounding(loss, at + towards) + rounding(loss, at - towards)
    assert abs(slope - float((loss.gradient(at) * towards).sum())) <= slack
    assert abs(slope - float((loss.weigh(loss.exact.residual(at)) * towards).sum())) <= slack
    assert torch.equal(loss.residual(at), plain.gradient(at))


@given(weighed())
def test_scaling_the_rows_changes_no_value(drawn):
    loss, plain, other = drawn
    scaled = loss.row_scaled()
    # A row that costs nothing counts a rounding of the dearest one.
    slack = rounding(loss, other) + 1e-15 * float(loss.metric.diagonal.max()) * plain.value(other) + 1e-18
    assert abs(scaled.value(loss.metric.row_scale[:, None] * other) - loss.value(other)) <= slack


@given(weighed())
def test_errors_are_reported_without_the_metric(drawn):
    loss, plain, other = drawn
    assert loss.relative_error(other) == plain.relative_error(other)
    assert torch.equal(loss.bias_change(other), plain.bias_change(other))


def test_the_identity_is_no_metric():
    loss = LayerLoss.of(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), InputMoments.from_samples(torch.randn(9, 2)), 0.1)
    for average in (torch.ones(2), torch.eye(2)):
        same = replace(loss, metric=OutputMetric(average, torch.zeros(2), 9))
        other = torch.tensor([[0.0, 2.0], [3.0, 0.5]])
        assert same.value(other) == pytest.approx(loss.value(other), rel=1e-6)
        assert same.constant == pytest.approx(loss.constant, rel=1e-6)


# -- what it does to solvers


def layer(metric, rows=4, width=6):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.01, metric=metric)


def test_an_unstructured_budget_goes_to_the_rows_that_matter():
    gradients = torch.tensor([[10.0, 1.0, 1.0, 0.1]], dtype=torch.float64)
    problem = SparseLeastSquares(layer(OutputMetric.from_samples(gradients, full=False)), Unstructured(12))
    alike = replace(problem, loss=problem.loss.plain)
    for solver in (Wanda(), Admm(), choose(problem)):
        solution, other = solve(problem, solver), solve(alike, solver).value
        assert int((solution.value[0] != 0).sum()) > int((solution.value[3] != 0).sum())
        assert solution.objective < problem.objective(other)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_diagonal_matrix_is_its_diagonal(kind):
    """A full metric without couplings gives what its diagonal gives."""
    diagonal = torch.tensor([4.0, 1.0, 0.25, 2.0], dtype=torch.float64)
    average = diagonal if kind == "diagonal" else torch.diag(diagonal)
    problem = SparseLeastSquares(layer(OutputMetric(average, torch.zeros(4).double(), 1)), Unstructured(12))
    scaled = replace(
        problem, loss=replace(problem.loss, weight=diagonal.sqrt()[:, None] * problem.loss.weight, metric=None)
    )
    for solver in (Wanda(), Admm()):
        expected = solve(scaled, solver).value / diagonal.sqrt()[:, None]
        assert torch.allclose(solve(problem, solver).value, expected, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_conjugate_gradients_solve_coupled_rows(seed):
    """The normal equations S (V A - B) = 0 on masks that differ, against a dense Kronecker solve."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    loss = layer(OutputMetric.from_samples(gradients).damped(0.1))
    mask = torch.rand(4, 6, generator=generator) < 0.6
    kept = mask.reshape(-1)
    hessian = torch.kron(loss.metric.matrix, loss.gram)[kept][:, kept]
    exact = torch.zeros(24, dtype=torch.float64)
    exact[kept] = torch.linalg.solve(hessian, loss.linear.reshape(-1)[kept])
    problem = MaskedLeastSquares(loss, mask)
    solution = solve(problem, ConjugateGradients(1e-10), max_steps=1000)
    assert torch.allclose(solution.value.reshape(-1), exact, rtol=1e-6, atol=1e-8)
    assert solution.certificate is not None
    assert solution.certificate.lower_bound <= problem.objective(exact.reshape(4, 6)) * (1 + 1e-12)
    # The couplings matter: without them the answer is another one, and worse.
    apart = solve(MaskedLeastSquares(loss.plain, mask), Restore()).value
    if bool((mask != mask[:1]).any()) and bool(mask.any(1).all()):
        assert problem.objective(apart) >= solution.objective


def test_admm_reaches_the_dense_minimiser_of_its_step():
    """With everything kept ADMM must end at the unpruned minimiser, which is W: its two-sided step is exact."""
    gradients = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = layer(OutputMetric.from_samples(gradients).damped(0.1)).row_scaled()
    problem = SparseLeastSquares(loss, Unstructured(24))
    solver = Admm()
    state = solver.init(problem, problem.start())
    state = replace(state, sparse=torch.zeros_like(state.sparse))
    v = solver.step(problem, state)
    # S V A' + rho V = S B' in the first step from Z = U = 0, and then Z = V.
    scale = loss.gram.diagonal().sqrt()
    system = torch.kron(loss.metric.matrix, loss.gram / torch.outer(scale, scale)) + 0.1 * torch.eye(24).double()
    exact = torch.linalg.solve(system, (loss.linear / scale).reshape(-1)).reshape(4, 6)
    assert torch.allclose(v.sparse, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("full", [True, False])
def test_an_output_that_costs_nothing_does_no_harm(full):
    gradients = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.5, 0.0, -1.0, 1.0]], dtype=torch.float64)
    loss = layer(OutputMetric.from_samples(gradients, full=full))
    for pattern in (Unstructured(12), RowWise(3)):
        problem = SparseLeastSquares(loss, pattern)
        for solver in (Wanda(), Admm(), choose(problem)):
            solution = solve(problem, solver)
            assert bool(torch.isfinite(solution.value).all())
            assert solution.violation == 0
    # A row that costs nothing keeps as many weights as any other, not a row of zeros that costs the same.
    for solver in (Wanda(), Admm(), choose(problem)):
        assert int((solve(problem, solver).value[1] != 0).sum()) == 3


@pytest.mark.parametrize("spike", [0.1, 0.3, 0.0])
def test_a_wide_metric_takes_nothing_from_what_is_kept(spike):
    """512 outputs, of which one direction holds a large share of the trace: dropping no unit must leave W."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(512, 512, generator=generator))[0]
    values = 0.98 ** torch.arange(512.0)
    if spike:
        values[0] = spike / (1 - spike) * values[1:].sum()
    else:
        values[200:] = 0.0
    metric = OutputMetric((directions * values) @ directions.T, torch.zeros(512), 512)
    weight, inputs = torch.randn(512, 8, generator=generator), torch.randn(64, 8, generator=generator)
    for damped in (metric, metric.damped(0.01)):
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.01, metric=damped)
        problem = StructuredLeastSquares(loss, Channels.of(8), 8)
        for solver in (Restore(), Magnitude(), choose(problem)):
            # R and its inverse in float32, with up to 1 / sqrt(eps) between their largest and least values.
            assert loss.relative_error(solve(problem, solver).value) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_are_summed_in_float32(dtype):
    """In bfloat16 a sum of ones stays at 256."""
    gradients = torch.ones(8, 4, dtype=dtype)
    sums = MetricSums(4, gradients, full=True)
    for _ in range(300):
        sums.add(gradients)
    found = sums.metric()
    assert found.average.dtype == torch.float32
    assert torch.equal(found.average, torch.ones(4, 4))


# -- faults planted

gradients = importlib.import_module("optprune.solvers.conjugate_gradients")
admm_init, whole_metric = Admm.init, MetricSums.metric


def wrong_basis(self, problem, start):
    state = admm_init(self, problem, start)
    return replace(state, row_vectors=None if state.row_vectors is None else state.row_vectors.T)


def rows_apart(loss, terms):
    return terms.sum(1)


def one_triangle(self):
    """The upper half of the matrix is not filled in."""
    found = whole_metric(self)
    return replace(found, average=found.average.tril()) if self.full else found


FAULTS = {
    "ADMM in the wrong basis": (Admm, "init", wrong_basis, test_admm_reaches_the_dense_minimiser_of_its_step),
    "a step for each row": (
        gradients,
        "_by_system",
        rows_apart,
        # Without the search for a smaller example: such steps do not end by themselves.
        lambda: test_conjugate_gradients_solve_coupled_rows.hypothesis.inner_test(0),
    ),
    "half of a matrix": (MetricSums, "metric", one_triangle, test_it_is_the_average_over_tokens_however_they_come),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
