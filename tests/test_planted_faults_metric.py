"""Faults planted where an output metric enters: for each a law or a test must raise."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings

from optprune import budget
from optprune.metric import MetricSums, OutputMetric
from optprune.models import fisher
from optprune.probe import Probe
from optprune.problems import LayerLoss, MaskedLeastSquares, PenalisedLeastSquares, SparseLeastSquares
from optprune.solvers import Admm, ConjugateGradients, Fista, PerspectiveBound, Restore, removal
from optprune.solvers.duality import DualMap
from optprune.testing import laws
from optprune.testing.strategies import weighted
from tests import test_budget, test_fisher, test_metric, test_probe, test_removal

run = importlib.import_module("optprune.solvers.run")
gradients = importlib.import_module("optprune.solvers.conjugate_gradients")
perspective = importlib.import_module("optprune.solvers.perspective")

apply, even, dual_map, admm_init = OutputMetric.apply, LayerLoss.even, DualMap.of, Admm.init
product, backward = perspective._product, fisher._backward


def keep_laws(solver, kind, metric):
    @settings(max_examples=40, phases=[Phase.generate])
    @given(weighted(kind, metric))
    def check(problem):
        if solver.why_not(problem) is None:
            laws.keep_laws(problem, solver)

    check()


def damping_forgotten(self, change):
    return apply(replace(self, damping=torch.zeros_like(self.damping)), change)


def not_scaled_back(solver, posed, state):
    return solver.value(posed.problem, state)


def rows_not_scaled(self):
    return even(self) if self.metric is None else replace(self, metric=self.metric.even())


def rows_apart(loss, terms):
    return terms.sum(1)


def couplings_forgotten(problem):
    found = dual_map(problem)
    return found if found.row_factor is None else replace(found, row_factor=torch.eye(len(found.row_factor)).double())


def split_forgotten(loss, split, rest, point):
    return product(loss, 0 * split, rest, point)


LAW_FAULTS = {
    "damping forgotten": (OutputMetric, "apply", damping_forgotten, ConjugateGradients(), MaskedLeastSquares, "full"),
    "rows not scaled back": (run, "_value", not_scaled_back, Restore(), MaskedLeastSquares, "diagonal"),
    "rows not scaled": (LayerLoss, "even", rows_not_scaled, Restore(), MaskedLeastSquares, "diagonal"),
    "bound without S^-1": (DualMap, "of", couplings_forgotten, Fista(), PenalisedLeastSquares, "full"),
    "relaxation without its split": (
        perspective,
        "_product",
        split_forgotten,
        PerspectiveBound(20),
        SparseLeastSquares,
        "full",
    ),
}


@pytest.mark.parametrize("fault", LAW_FAULTS)
def test_faults_are_noticed_by_the_laws(fault, monkeypatch):
    owner, name, what, solver, kind, metric = LAW_FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError):
        keep_laws(solver, kind, metric)


def wrong_basis(self, problem, start):
    state = admm_init(self, problem, start)
    return replace(state, row_vectors=None if state.row_vectors is None else state.row_vectors.T)


def gradients_of_inputs(decoder, index, hidden, arguments, gradient):
    """The gradient that goes on to the block before is not that of the block's input."""
    found, _ = backward(decoder, index, hidden, arguments, gradient)
    return found, gradient


def most_likely(seed):
    return lambda logits, ids: logits.argmax(-1)


def no_refit(loss):
    costs = loss.weight.square() * loss.gram.diagonal() / 2
    return costs if loss.metric is None else loss.metric.diagonal[:, None] * costs


def limits_forgotten(costs, keep, low=0.0, high=1.0):
    return budget_threshold(costs, keep)


def one_triangle(self):
    """The upper half of the matrix is not filled in."""
    found = whole_metric(self)
    return replace(found, average=found.average.tril()) if self.full else found


def wrong_way_round(self, dense, changed):
    """KL(changed || dense)."""
    return divergence(self, changed, dense)


whole_metric, divergence = MetricSums.metric, Probe._divergence
budget_threshold = budget.global_threshold
TEST_FAULTS = {
    "ADMM in the wrong basis": (
        Admm,
        "init",
        wrong_basis,
        test_metric.test_admm_reaches_the_dense_minimiser_of_its_step,
    ),
    "a step for each row": (
        gradients,
        "_by_system",
        rows_apart,
        # Without the search for a smaller example: such steps never end by themselves.
        lambda: test_metric.test_conjugate_gradients_solve_coupled_rows.hypothesis.inner_test(0),
    ),
    "gradient not passed on": (
        fisher,
        "_backward",
        gradients_of_inputs,
        lambda: test_fisher.test_block_by_block_equals_one_pass_through_the_model(
            test_fisher.tiny_llama, lambda: test_fisher.sampled(3)
        ),
    ),
    "labels that are not drawn": (test_fisher, "sampled", most_likely, test_fisher.test_labels_follow_the_predictions),
    "cost without the refit": (
        test_removal,
        "entry_costs",
        no_refit,
        test_removal.test_the_cost_of_an_entry_is_the_rise_with_its_row_refitted,
    ),
    "half of a matrix": (
        MetricSums,
        "metric",
        one_triangle,
        test_metric.test_it_is_the_average_over_tokens_however_they_come,
    ),
    "divergence the wrong way round": (
        Probe,
        "_divergence",
        wrong_way_round,
        lambda: test_probe.test_it_is_the_divergence_of_the_whole_model(test_probe.tiny_llama),
    ),
    "limits forgotten": (
        test_budget,
        "global_threshold",
        limits_forgotten,
        test_budget.test_counts_are_exact_and_the_best_within_the_limits,
    ),
    "hull of all choices": (
        budget.Curve,
        "hull",
        lambda self: list(range(len(self.prices))),
        test_budget.test_the_hull_is_convex_falls_and_lies_below_every_choice,
    ),
}


@pytest.mark.parametrize("fault", TEST_FAULTS)
def test_faults_are_noticed_by_their_tests(fault, monkeypatch):
    owner, name, what, test = TEST_FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError):
        test()


def test_the_faults_are_what_fails():
    """The same checks pass without a fault."""
    for _, _, _, solver, kind, metric in LAW_FAULTS.values():
        keep_laws(solver, kind, metric)
    assert removal.entry_costs is test_removal.entry_costs
