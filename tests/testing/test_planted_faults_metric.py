"""Faults planted where an output metric enters: for each a law must raise. Others are planted beside their tests."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings

from optprune.problems import LayerLoss, MaskedLeastSquares, PenalisedLeastSquares, SparseLeastSquares
from optprune.problems.exact import ExactLoss
from optprune.solvers import ConjugateGradients, Fista, PerspectiveBound, Restore
from optprune.solvers.verified import VerifiedLoss
from optprune.testing import laws
from optprune.testing.strategies import weighted

run = importlib.import_module("optprune.solvers.run")

weigh, row_scaled = ExactLoss.weigh, LayerLoss.row_scaled


def keep_laws(solver, kind, metric, examples=40):
    @settings(max_examples=examples, phases=[Phase.generate])
    @given(weighted(kind, metric))
    def check(problem):
        if solver.refusal(problem) is None:
            laws.keep_laws(problem, solver)

    check()


def damping_forgotten(self, change):
    metric = self.metric and replace(self.metric, damping=torch.zeros_like(self.metric.damping))
    return weigh(replace(self, metric=metric), change)


def not_scaled_back(solver, posed, state):
    return solver.value(posed.problem, state)


def rows_not_scaled(self):
    return row_scaled(self) if self.metric is None else replace(self, metric=self.metric.row_scaled())


def metric_forgotten(self, change):
    """In the place of `VerifiedLoss.gradient`."""
    residual, error = self.residual(change)
    return residual, torch.outer(error, self.inputs.size)


LAW_FAULTS = {
    "damping forgotten": (ExactLoss, "weigh", damping_forgotten, ConjugateGradients(), MaskedLeastSquares, "full"),
    "rows not scaled back": (run, "_value", not_scaled_back, Restore(), MaskedLeastSquares, "diagonal"),
    "rows not scaled": (LayerLoss, "row_scaled", rows_not_scaled, Restore(), MaskedLeastSquares, "diagonal"),
    "bound without S": (VerifiedLoss, "gradient", metric_forgotten, Fista(), PenalisedLeastSquares, "full"),
    "relaxation without S": (
        VerifiedLoss,
        "gradient",
        metric_forgotten,
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


@pytest.mark.slow
def test_the_faults_are_what_fails():
    """The same checks pass without a fault; test_metric_laws has more of them."""
    for _, _, _, solver, kind, metric in LAW_FAULTS.values():
        keep_laws(solver, kind, metric, examples=10)
