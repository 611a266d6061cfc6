"""The ridge chosen on held-out tokens: against plain normal equations, and what a run does with it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optprune.calibration import POLICIES
from optprune.errors import InputError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import Unstructured
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    LayerLoss,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.solvers import Chain, ConjugateGradients, FaspMetric, Restore, Solver, Wanda, solve
from optprune.solvers import ridge as module
from optprune.solvers.ridge import HeldOut, Refitted, refit
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.token_batches import batches

OUT, IN, DAMPINGS = 4, 10, (0.0, 0.01, 0.1, 1.0)
SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("columns", "weights", "weights under a matrix")


@dataclass(frozen=True)
class Case:
    """A problem with few tokens, whose inputs are not the dense ones, and other tokens apart."""

    problem: Problem
    solver: Solver
    actual: Tensor
    dense: Tensor
    actual_apart: Tensor
    dense_apart: Tensor

    @property
    def apart(self) -> InputMoments:
        return InputMoments.from_samples(self.actual_apart, self.dense_apart)

    def refitted(self, **options: bool) -> Refitted:
        return refit(self.problem, solve(self.problem, self.solver), self.apart, DAMPINGS, self.solver, **options)


def case(kind: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, mixing = normal(OUT, IN), normal(IN, IN)
    dense, dense_apart = normal(14, IN) @ mixing, normal(40, IN) @ mixing
    actual, actual_apart = dense + normal(14, IN), dense_apart + normal(40, IN)
    metric = OutputMetric.from_samples(normal(20, OUT)).damped(0.1) if "matrix" in kind else None
    loss = LayerLoss.of(weight, InputMoments.from_samples(actual, dense), 0.01, metric=metric)
    if kind == "columns":
        problem: Problem = StructuredLeastSquares(loss, Channels.of(IN), 6)
        solver = Chain((FaspMetric(), Restore()))
    else:
        problem, solver = SparseLeastSquares(loss, Unstructured(24)), Chain((Wanda(), ConjugateGradients(1e-12)))
    return Case(problem, solver, actual, dense, actual_apart, dense_apart)


def normal_equations(problem: Problem, actual: Tensor, dense: Tensor, mask: Tensor, damping: float) -> Tensor:
    """The minimiser on a mask over tokens, by one dense Kronecker system."""
    gram, cross = actual.T @ actual / len(actual), dense.T @ actual / len(actual)
    ridge = damping * gram.diagonal().mean() * torch.eye(IN).double()
    metric = problem.loss.metric
    s = torch.eye(OUT).double() if metric is None else metric.matrix
    kept = mask.reshape(-1)
    system = torch.kron(s, gram + ridge)[kept][:, kept]
    right = (s @ problem.loss.weight @ (cross + ridge)).reshape(-1)[kept]
    answer = torch.zeros(OUT * IN).double()
    answer[kept] = torch.from_numpy(np.linalg.solve(system.numpy(), right.numpy()))
    return answer.reshape(OUT, IN)


def loss_on(problem: Problem, actual: Tensor, dense: Tensor, value: Tensor) -> float:
    change = actual @ value.T - dense @ problem.loss.weight.T
    metric = problem.loss.metric
    return float((change.T * (change.T if metric is None else metric.matrix @ change.T)).sum()) / len(actual)


def check_choice(kind: str, seed: int) -> None:
    """The damping with the least loss on the tokens apart; their relative error; then all tokens, on the same mask."""
    this = case(kind, seed)
    problem, mask = this.problem, solve(this.problem, this.solver).value != 0
    answers = [normal_equations(problem, this.actual, this.dense, mask, damping) for damping in DAMPINGS]
    losses = [loss_on(problem, this.actual_apart, this.dense_apart, answer) for answer in answers]
    best = int(np.argmin(losses))
    if sorted(losses)[1] < losses[best] * (1 + 1e-6):
        return  # no choice to check
    alone = this.refitted(join=False)
    assert torch.allclose(alone.solution.value, answers[best], rtol=1e-6, atol=1e-8)
    change = this.actual_apart @ answers[best].T - this.dense_apart @ problem.loss.weight.T
    scale = float((this.dense_apart @ problem.loss.weight.T).square().sum())
    assert alone.held_out_error == pytest.approx(float(change.square().sum()) / scale, rel=1e-6)

    joined = this.refitted()
    actual, dense = torch.cat([this.actual, this.actual_apart]), torch.cat([this.dense, this.dense_apart])
    exact = normal_equations(problem, actual, dense, mask, DAMPINGS[best])
    assert torch.allclose(joined.solution.value, exact, rtol=1e-6, atol=1e-8)
    assert joined.held_out_error == alone.held_out_error
    assert joined.problem.loss.moments.tokens == len(actual)
    assert joined.solution.objective == pytest.approx(joined.problem.objective(exact), rel=1e-9)
    assert joined.solution.violation == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_ridge_of_a_few_cases_is_taken(kind: str) -> None:
    for seed in range(2):
        check_choice(kind, seed)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * ("matrix" in kind)) for kind in KINDS])
@given(SEEDS)
def test_the_ridge_with_the_least_loss_on_the_tokens_apart_is_taken(kind: str, seed: int) -> None:
    check_choice(kind, seed)


@given(SEEDS, st.booleans(), st.sampled_from([None, "diagonal", "full"]))
def test_held_out_tokens_are_measured_with_the_bias_that_was_fitted(
    seed: int, fit_bias: bool, kind: str | None
) -> None:
    """Against the outputs themselves, for tokens whose means differ from those of the tokens fitted."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dense, dense_apart = normal(30, IN) + normal(IN), normal(20, IN) + normal(IN)
    actual, actual_apart = dense + normal(30, IN), dense_apart + normal(20, IN)
    metric = None if kind is None else OutputMetric.from_samples(normal(20, OUT), full=kind == "full").damped(0.1)
    moments = InputMoments.from_samples(actual, dense)
    loss = LayerLoss.of(normal(OUT, IN), moments, 0.01, fit_bias=fit_bias, metric=metric)
    value = normal(OUT, IN)
    bias = (dense @ loss.weight.T - actual @ value.T).mean(0) if fit_bias else torch.zeros(OUT).double()
    error = actual_apart @ value.T + bias - dense_apart @ loss.weight.T
    signal = dense_apart @ loss.weight.T
    if fit_bias:
        signal = signal - signal.mean(0)
    found = HeldOut.of(loss, InputMoments.from_samples(actual_apart, dense_apart))
    weighed = error if metric is None else error @ metric.matrix
    assert found.value(value) == pytest.approx(float((error * weighed).sum()) / 2 / 20, rel=1e-9)
    assert found.relative_error(value) == pytest.approx(float(error.square().sum() / signal.square().sum()), rel=1e-9)


@pytest.mark.parametrize("fault", ["the worst", "damping not undone", "not joined"])
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "the worst":
        monkeypatch.setattr(module, "min", max, raising=False)
    elif fault == "damping not undone":
        monkeypatch.setattr(LayerLoss, "damped", lambda self, fraction: self)
    else:
        monkeypatch.setattr(InputMoments, "merge", lambda self, other: self)
    with pytest.raises(AssertionError):
        for seed in range(5):
            check_choice("columns", seed)


@pytest.mark.e2e
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "fasp"), ("opt", "fasp"), ("qwen2", "spap_plus"), ("llama", "alps")]
)
def test_a_run_chooses_a_ridge_for_every_layer(name: str, recipe: str, policy: str) -> None:
    settings = {"refit.held_out": 0.25, "propagation": policy, "refit.dampings": list(DAMPINGS[1:])}
    model = TINY_MODELS[name]()
    report = prune(model, batches(), load_recipe(recipe, settings))
    plain = prune(TINY_MODELS[name](), batches(), load_recipe(recipe, {**settings, "refit.dampings": []}))
    for layer, other in zip(report.layers, plain.layers, strict=True):
        # In the end the tokens apart are fitted as well, and what was measured on them is from before.
        assert layer.tokens == 4 * 96
        assert other.tokens == 3 * 96
        assert layer.kept == other.kept
        assert layer.held_out_error is not None
        assert layer.stages[-1]["label"] == "before the refit"
    assert report.layers[0].held_out_error <= plain.layers[0].held_out_error * (1 + 1e-3)


def test_recovery_keeps_its_tokens_apart() -> None:
    settings = {"refit.held_out": 0.25, "refit.recovery": 1, "refit.dampings": list(DAMPINGS[1:])}
    report = prune(TINY_MODELS["llama"](), batches(), load_recipe("fasp", settings))
    assert all(layer.tokens == 3 * 96 for layer in report.layers)
    assert report.recovered


def test_what_it_needs_is_asked_for() -> None:
    with pytest.raises(InputError, match="held_out"):
        load_recipe("fasp", {"refit.dampings": [0.1]})
    with pytest.raises(InputError, match="ends with restore"):
        load_recipe("wanda", {"refit.dampings": [0.1], "refit.held_out": 0.25})
    with pytest.raises(InputError, match="greater than or equal to 0"):
        load_recipe("fasp", {"refit.dampings": [-0.1], "refit.held_out": 0.25})


def test_a_problem_that_is_solved_without_a_refit_says_so() -> None:
    penalised = PenalisedLeastSquares(case("weights", 0).problem.loss, L1(0.1))
    with pytest.raises(InputError, match="needs a refit at the end"):
        refit(penalised, solve(penalised), case("weights", 0).apart, DAMPINGS)
