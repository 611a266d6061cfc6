"""Faults planted in the core: the laws must raise for each. Were they blind, every other test would pass as well."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings

from optprune import moments as moments_module
from optprune.errors import OwnCodeError
from optprune.moments import InputMoments
from optprune.patterns import SlotWise
from optprune.problems import LayerLoss, MaskedLeastSquares, StructuredLeastSquares
from optprune.problems.exact import ExactLoss
from optprune.solvers import Certificate, FaspMetric, Restore, solve
from optprune.solvers.spectrum import ScaledGram
from optprune.testing import check_solver, laws
from optprune.testing.strategies import PATTERNS, masked, samples
from tests.helpers.faults import one_scale_for_all
from tests.helpers.sparse_cases import correlated_loss

UNSHRUNK = settings(phases=[Phase.generate])
"""a fault is planted, so nobody needs the smallest example of it"""

restore_module = importlib.import_module("optprune.solvers.restore")
newton_step = restore_module._newton_step
certificate = restore_module.restored_bound
restore = Restore._restore
mask = StructuredLeastSquares.mask
project = SlotWise.project
merge = InputMoments.merge


def scaled_step(factor):
    """Restoration whose step is multiplied by a factor; its certificate, which would say so too, is left out."""

    def answer(self, problem, certify=True):
        start = problem.start()
        return replace(
            restore(self, problem), value=start + factor * (restore(self, problem).value - start), certificate=None
        )

    return answer


def newton_step_of_the_wrong_sign(*arguments):
    found, singular = newton_step(*arguments)
    return -found, singular


def start_unchanged(self, problem, certify=True):
    return replace(restore(self, problem), value=problem.start(), certificate=None)


def inverted(self, problem, certify=True):
    other = MaskedLeastSquares(problem.loss, ~problem.mask)
    return restore(self, other)


def raised(by):
    """Bounds raised by a share of the objective and a little more."""

    def certify(problem, value):
        found = certificate(problem, value)
        if found is None:
            return None
        return Certificate(found.lower_bound + by * (problem.objective(value) + 1e-6), "raised")

    return certify


def undamped(self, problem, certify=True):
    found = restore(self, replace(problem, loss=problem.loss.damped(0.0)))
    return replace(found, certificate=None)


def bias_forgotten(self, problem, certify=True):
    found = restore(self, replace(problem, loss=replace(problem.loss, fit_bias=False)))
    return replace(found, certificate=None)


def dense_forgotten(self, problem, certify=True):
    statistics = replace(problem.loss.moments, drift=None)
    found = restore(self, replace(problem, loss=replace(problem.loss, moments=statistics)))
    return replace(found, certificate=None)


def last_row_skipped(self, problem, certify=True):
    found = restore(self, problem)
    found.value[-1] = problem.start()[-1]
    return found


def first_row_for_all(self, problem, certify=True):
    """One factor for all rows, whatever their masks: right where the mask is shared."""
    shared = restore(self, replace(problem, mask=problem.mask[:1]))
    return replace(shared, value=torch.where(problem.mask, shared.value, 0.0))


def in_place(self, problem, certify=True):
    found = restore(self, problem)
    problem.loss.weight.copy_(found.value)
    return found


STEP = "optprune.solvers.restore._newton_step"
RESTORE = "optprune.solvers.restore.Restore._restore"
CERTIFY = "optprune.solvers.restore.restored_bound"

# Each with the law that must notice it first, so that no law is there for show.
FAULTS = {
    "sign of the step flipped": (RESTORE, scaled_step(-1), "made its start worse|exact, but"),
    "sign flipped in the certificate as well": (STEP, newton_step_of_the_wrong_sign, "worse|exact, but|bound"),
    "step halved": (RESTORE, scaled_step(0.5), "exact, but its objective"),
    "step a thousandth too short": (RESTORE, scaled_step(0.999), "exact, but its objective"),
    "step dropped": (RESTORE, scaled_step(0), "exact, but its objective"),
    "start returned unchanged": (RESTORE, start_unchanged, "exact, but its objective"),
    "damping dropped": (RESTORE, undamped, "exact, but its objective|worse"),
    "bias not fitted": (RESTORE, bias_forgotten, "exact, but its objective|worse"),
    "dense inputs forgotten": (RESTORE, dense_forgotten, "exact, but its objective|worse"),
    "mask inverted": (RESTORE, inverted, "violates"),
    "last row skipped": (RESTORE, last_row_skipped, "exact, but its objective"),
    "the first row's mask used for all": (RESTORE, first_row_for_all, "exact, but|worse|permuted"),
    "the weight overwritten": (RESTORE, in_place, "writes into the weight"),
    "bound raised by a thousandth": (CERTIFY, raised(1e-3), "lower bound"),
    "bound raised by half": (CERTIFY, raised(0.5), "lower bound"),
}


def test_without_a_fault_the_laws_hold():
    check_solver(Restore(), examples=10)


@pytest.mark.e2e
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_restoration_are_noticed(fault, monkeypatch):
    where, what, message = FAULTS[fault]
    monkeypatch.setattr(where, what)
    with pytest.raises(AssertionError, match=message):
        check_solver(Restore(), examples=40, shrink=False)


def test_one_scale_for_all_inputs_is_noticed(monkeypatch):
    """Small inputs then look like the rounding of large ones."""
    monkeypatch.setattr(LayerLoss, "input_scale", property(one_scale_for_all))

    @UNSHRUNK
    @given(masked())
    def check(problem):
        laws.units_are_harmless(problem, Restore())

    with pytest.raises(AssertionError, match="given in the units"):
        check()


def rounding_inverted(self, blocks, right):
    return torch.linalg.solve(blocks + 1e-17 * torch.eye(blocks.shape[-1]), right, left=False)


def nothing_solved(self, blocks, right):
    return torch.zeros_like(right)


@pytest.mark.e2e
@pytest.mark.parametrize("fault", [pytest.param(rounding_inverted, marks=pytest.mark.slow), nothing_solved])
def test_faults_where_a_block_is_singular_are_noticed(fault, monkeypatch):
    monkeypatch.setattr(ScaledGram, "solve_singular", fault)
    with pytest.raises((AssertionError, OwnCodeError)):
        check_solver(Restore(), examples=40, shrink=False)


# -- in what problems are made of: here the problem measures wrongly, and the references must contradict it


def gram_without_damping(self):
    return self._statistics.gram


def half_value(self, weight):
    return tuple(part / 2 for part in terms(self, weight))


def value_without_damping(self, weight):
    return terms(self, weight)[0], 0.0


def gradient_without_pull(self, weight):
    return (weight - self.weight) @ self.gram


def complement(self, choice):
    return mask(self, ~choice)


terms = ExactLoss._terms

CORE_FAULTS = {
    "the Gram matrix without damping": (LayerLoss, "gram", property(gram_without_damping), Restore()),
    "the gradient without the drift of the inputs": (LayerLoss, "residual", gradient_without_pull, Restore()),
    "the loss halved": (ExactLoss, "_terms", half_value, Restore()),
    "the loss without damping": (ExactLoss, "_terms", value_without_damping, Restore()),
    "the chosen units removed in place of the others": (StructuredLeastSquares, "mask", complement, FaspMetric()),
    "one unit too many": (
        SlotWise,
        "project",
        lambda self, score: project(replace(self, keep=min(self.keep + 1, int((self.slots == 0).sum()))), score),
        FaspMetric(),
    ),
    "the moments of x not centred": (InputMoments, "centred", lambda self: self, Restore()),
}


def test_an_objective_below_the_optimum_is_noticed(monkeypatch):
    loss = correlated_loss(0, 3, 6)
    problem = MaskedLeastSquares(loss, torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.5)
    solution = solve(problem, Restore())
    laws.never_below_the_reference(problem, Restore())
    monkeypatch.setattr(laws, "answer", lambda *_: replace(solution, objective=0.999 * solution.objective))
    with pytest.raises(AssertionError, match="is below the optimum"):
        laws.never_below_the_reference(problem, Restore())


@pytest.mark.e2e
@pytest.mark.parametrize("fault", CORE_FAULTS)
def test_planted_faults_in_problems_are_noticed(fault, monkeypatch):
    owner, name, what, solver = CORE_FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError):
        check_solver(solver, examples=40, shrink=False)


def worst_instead_of_best(self, score):
    return type(self).original(self, -score)


@pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.__name__)
def test_a_projection_onto_the_worst_mask_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(kind, "original", kind.project, raising=False)
    monkeypatch.setattr(kind, "project", worst_instead_of_best)

    @UNSHRUNK
    @given(PATTERNS[kind])
    def check(drawn):
        laws.projection_is_best(*drawn)

    with pytest.raises(AssertionError, match="the projection only"):
        check()


def unweighted(self, other):
    one, two = self.parts(), other.parts()
    covariance, mean = [(a + b) / 2 for a, b in zip(one, two, strict=True)][:2]
    return replace(merge(self, other), covariance=covariance, mean=mean)


def test_a_merge_that_ignores_the_numbers_of_tokens_is_noticed(monkeypatch):
    monkeypatch.setattr(moments_module.InputMoments, "merge", unweighted)

    @UNSHRUNK
    @given(samples(2))
    def check(drawn):
        if drawn.inputs.shape[0] > 2:
            laws.merging_is_one_pass(drawn.inputs, drawn.dense, 1)

    with pytest.raises(AssertionError, match="differ from one pass"):
        check()


@pytest.mark.parametrize("fault", ["half_value", "value_without_damping"])
def test_a_loss_that_is_not_the_mean_is_noticed(fault, monkeypatch):
    inputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = LayerLoss.of(torch.ones(2, 3), InputMoments.from_samples(inputs), 0.1)
    laws.value_is_the_mean_over_samples(loss, torch.zeros(2, 3), inputs, None)
    monkeypatch.setattr(ExactLoss, "_terms", globals()[fault])
    with pytest.raises(AssertionError, match="the samples say"):
        laws.value_is_the_mean_over_samples(loss, torch.zeros(2, 3), inputs, None)
