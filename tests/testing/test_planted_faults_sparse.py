"""Faults planted in the penalised and the sparse solvers: for each a law or a test must raise.

One fault that was looked at is none: FISTA's momentum, kept where it should restart, only costs steps.
"""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from optprune.penalties import L1, ColumnGroups, shrink
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    Fista,
    FistaPath,
    FistaPruner,
    HardThreshold,
    PerspectiveBound,
    Swaps,
)
from optprune.solvers.duality import DualMap
from optprune.testing import check_solver
from tests.helpers.sparse_cases import PATTERN_NAMES
from tests.solvers import test_fista, test_sparse_solvers
from tests.vocabulary import test_penalties

fista = importlib.import_module("optprune.solvers.fista")
swaps = importlib.import_module("optprune.solvers.swaps")
sparsegpt = importlib.import_module("optprune.solvers.sparsegpt")
perspective = importlib.import_module("optprune.solvers.perspective")
hard_threshold = importlib.import_module("optprune.solvers.hard_threshold")

begin, move, admm_step = Fista._begin, Fista._move, Admm.step
pruner_step, threshold_step = FistaPruner.step, HardThreshold.step
best_in_rows, best_in_groups, between_rows = swaps._best_in_rows, swaps._best_in_groups, swaps._between_rows
inverse_gram, gradients_init, path_step = sparsegpt.inverse_gram, ConjugateGradients.init, FistaPath.step
diagonal_split, perspective_bound = perspective.diagonal_split, perspective._bound
largest_eigenvalue_bound, column_steps = fista.largest_eigenvalue_bound, fista.column_steps


# -- FISTA and its certificate


def halved_prox(self, weight, step):
    return shrink(weight, self.strength * step / 2)


def halved_group_prox(self, weight, step):
    norms = weight.norm(dim=0)
    kept = (norms - self.strength * step / 2).clamp(min=0)
    return weight * (kept / torch.where(norms > 0, norms, 1.0))


def uphill(self, problem, start, descent=None):
    motion = begin(self, problem, start, descent)
    step = motion.descent
    matrix = 2 * torch.eye(len(step.matrix)).to(step.matrix) - step.matrix
    return replace(motion, descent=replace(step, matrix=matrix, shift=-step.shift), point=start @ matrix - step.shift)


def target_forgotten(self, problem, start, descent=None):
    motion = begin(self, problem, start, descent)
    step = motion.descent
    return replace(motion, descent=replace(step, shift=0 * step.shift), point=start @ step.matrix)


def twice_the_step(gram):
    return 2 * column_steps(gram)


def half_the_bound(matrix, *arguments):
    return largest_eigenvalue_bound(matrix, *arguments) / 2


def prox_forgotten(self, problem, state):
    return move(self, replace(problem, penalty=L1(0.0)), state)


def unclipped(self, weight, dual):
    return self.loss.value(weight) + float((dual * weight).sum())


def unlimited(self, weight, dual):
    slope = float((dual * self.minimiser).sum())
    curve = max(self.loss.value(weight) - self.least, 0.0)
    scale = slope / (2 * curve) if curve > 0 else 0.0
    return self.least + scale * slope - scale * scale * curve


def nearest_forgotten(self, weight, dual):
    inside = dual - self.penalty.prox(dual, torch.ones((), dtype=dual.dtype))
    conjugate = self.penalty.conjugate(inside)
    return self.loss.value(weight) + float((inside * weight).sum()) - (0 if math.isinf(conjugate) else conjugate)


FISTA_FAULTS = {
    "threshold halved": (L1, "prox", halved_prox),
    "threshold of groups halved": (ColumnGroups, "prox", halved_group_prox),
    "sign of the gradient": (Fista, "_begin", uphill),
    "target forgotten": (Fista, "_begin", target_forgotten),
    "step doubled": (fista, "column_steps", twice_the_step),
    "prox forgotten": (Fista, "_move", prox_forgotten),
    "certificate not clipped": (DualMap, "_projected", unclipped),
    "certificate scaled beyond the dual ball": (DualMap, "_scaled", unlimited),
    "certificate at the wrong point": (DualMap, "_projected", nearest_forgotten),
}


@pytest.mark.parametrize("fault", FISTA_FAULTS)
def test_faults_in_fista_are_noticed_by_the_laws(fault, monkeypatch):
    monkeypatch.setattr(*FISTA_FAULTS[fault])
    with pytest.raises(AssertionError, match=r"promises|bound|worse|below|NaN"):
        check_solver(Fista(), examples=40, shrink=False)


def test_a_doubled_step_for_all_columns_is_noticed_by_the_laws(monkeypatch):
    monkeypatch.setattr(fista, "largest_eigenvalue_bound", half_the_bound)
    with pytest.raises(AssertionError, match=r"promises|bound|worse|below|NaN"):
        check_solver(Fista(scale_columns=False), examples=40, shrink=False)


def test_a_fault_in_the_certificate_is_noticed_from_any_weight(monkeypatch):
    monkeypatch.setattr(*FISTA_FAULTS["certificate not clipped"])
    with pytest.raises(AssertionError):
        test_fista.test_a_bound_from_any_weight_is_a_bound()


@pytest.mark.parametrize("fault", ["threshold halved", "threshold of groups halved"])
def test_a_halved_threshold_is_noticed_by_moreau(fault, monkeypatch):
    monkeypatch.setattr(*FISTA_FAULTS[fault])
    with pytest.raises(AssertionError):
        test_penalties.test_the_proximal_operator_attains_equality_in_fenchels_inequality()


# -- sparse solvers held by the laws


def wrong_gain_in_rows(state, *arguments):
    return best_in_rows(replace(state, gradient=-state.gradient), *arguments)


def wrong_gain_in_groups(state, *arguments):
    return best_in_groups(replace(state, gradient=-state.gradient), *arguments)


def wrong_gain_between_rows(state, gram):
    """The removal cost r = v g + A v^2 / 2 in place of A v^2 / 2 - v g; the gradient itself is put back."""
    before = state.gradient.clone()
    state.gradient.neg_()
    moved = between_rows(state, gram)
    state.gradient.add_(before, alpha=2)
    return moved


def whole_diagonal(loss):
    return loss.gram.double().diagonal().clone()


def split_a_little_too_large(loss):
    return 1.02 * diagonal_split(loss) + 1e-3 * loss.gram.double().diagonal()


def term_halved(problem, split, rest, point):
    return perspective_bound(problem, 2 * split, rest, point)


LAW_FAULTS = {
    "gain of an exchange between rows": (swaps, "_between_rows", wrong_gain_between_rows, Swaps(), "worse"),
    "split of the whole diagonal": (perspective, "diagonal_split", whole_diagonal, PerspectiveBound(20), "bound"),
    "split too large": (
        perspective,
        "diagonal_split",
        split_a_little_too_large,
        PerspectiveBound(20),
        "bound",
    ),
    "perspective term halved": (perspective, "_bound", term_halved, PerspectiveBound(20), "bound"),
    "hard thresholding with four times the step": (
        hard_threshold,
        "column_steps",
        lambda gram: 4 * column_steps(gram),
        HardThreshold(),
        "worse|NaN|objective",
    ),
}


@pytest.mark.parametrize("fault", LAW_FAULTS)
def test_faults_in_sparse_solvers_are_noticed_by_the_laws(fault, monkeypatch):
    owner, name, what, solver, message = LAW_FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError, match=message):
        check_solver(solver, examples=60, shrink=False)


# -- heuristics promise little, so tests against literal implementations and on fixed sets must notice


def dual_dropped(self, problem, state):
    after = admm_step(self, problem, state)
    return replace(after, dual=torch.zeros_like(after.dual))


def dual_reversed(self, problem, state):
    after = admm_step(self, problem, state)
    return replace(after, dual=2 * state.dual - after.dual)


def uncompensated(loss):
    inverse, weight = inverse_gram(loss)
    return torch.diag(inverse.diagonal()), weight


def negative_preconditioner(self, problem, start):
    state = gradients_init(self, problem, start)
    return replace(state, inverse_diagonal=-state.inverse_diagonal, direction=-state.direction, energy=-state.energy)


def bisection_flipped(self, problem, state):
    after, middle = pruner_step(self, problem, state), (state.low + state.high) / 2
    raised = after.low != state.low
    return replace(after, low=state.low if raised else middle, high=middle if raised else state.high)


def penalty_never_raised(self, problem, state):
    after = pruner_step(self, problem, state)
    return replace(after, low=state.low, high=(state.low + state.high) / 2)


def pruner_stands_still(self, problem, state):
    return replace(state, failures=state.failures + 1)


def path_not_moved(self, problem, state):
    after = path_step(self, problem, state)
    return replace(after, dense=state.dense, mask=state.mask)


def path_never_rises(self, problem, state):
    return replace(path_step(self, problem, state), strength=state.strength)


def threshold_not_moved(self, problem, state):
    after = threshold_step(self, problem, state)
    return replace(after, weight=state.weight, mask=state.mask)


def every_pattern(test, *arguments):
    def run():
        for pattern in PATTERN_NAMES:
            test(pattern, *arguments)

    return run


TEST_FAULTS = {
    "ADMM without its dual": (
        Admm,
        "step",
        dual_dropped,
        every_pattern(test_sparse_solvers.test_admm_is_feasible_and_with_a_refit_better_than_wanda_with_a_refit),
    ),
    "ADMM with the dual reversed": (
        Admm,
        "step",
        dual_reversed,
        every_pattern(test_sparse_solvers.test_admm_is_feasible_and_with_a_refit_better_than_wanda_with_a_refit),
    ),
    # An entering weight gets its best value whichever it is, so from a bad start even wrong exchanges gain: the law
    # about starts does not see this one.
    "gain of an exchange in a row": (
        swaps,
        "_best_in_rows",
        wrong_gain_in_rows,
        lambda: test_sparse_solvers.test_every_round_of_swaps_lowers_the_objective_by_what_it_predicts(
            "rows", 0, torch.float64
        ),
    ),
    "gain of an exchange in a group": (
        swaps,
        "_best_in_groups",
        wrong_gain_in_groups,
        lambda: test_sparse_solvers.test_every_round_of_swaps_lowers_the_objective_by_what_it_predicts(
            "2:4", 0, torch.float64
        ),
    ),
    "FISTAPruner with its bisection flipped": (
        FistaPruner,
        "step",
        bisection_flipped,
        every_pattern(test_sparse_solvers.test_fistapruner_is_the_literal_loop, 0),
    ),
    "FISTAPruner that never raises its penalty": (
        FistaPruner,
        "step",
        penalty_never_raised,
        every_pattern(test_sparse_solvers.test_fistapruner_is_the_literal_loop, 0),
    ),
    "FISTAPruner that returns its start": (
        FistaPruner,
        "step",
        pruner_stands_still,
        lambda: test_sparse_solvers.test_fistapruner_improves_on_sparsegpt_by_the_stated_share("unstructured"),
    ),
    "a path that is not followed": (
        FistaPath,
        "step",
        path_not_moved,
        lambda: test_sparse_solvers.test_the_path_with_a_refit_is_better_than_wanda_with_a_refit_by_the_stated_share(
            "rows"
        ),
    ),
    "a path whose penalty never rises": (
        FistaPath,
        "step",
        path_never_rises,
        lambda: test_sparse_solvers.test_the_path_with_a_refit_is_better_than_wanda_with_a_refit_by_the_stated_share(
            "rows"
        ),
    ),
    "hard thresholding that returns its start": (
        HardThreshold,
        "step",
        threshold_not_moved,
        every_pattern(test_sparse_solvers.test_a_step_of_hard_thresholding_is_the_literal_formula, 0),
    ),
    "SparseGPT without compensation": (
        sparsegpt,
        "inverse_gram",
        uncompensated,
        every_pattern(test_sparse_solvers.test_sparsegpt_is_the_literal_column_by_column_method, 0, 128),
    ),
    "a preconditioner of the wrong sign": (
        ConjugateGradients,
        "init",
        negative_preconditioner,
        test_sparse_solvers.test_conjugate_gradients_agree_with_restoration,
    ),
}


@pytest.mark.parametrize("fault", TEST_FAULTS)
def test_faults_in_heuristics_are_noticed_by_their_tests(fault, monkeypatch):
    owner, name, what, test = TEST_FAULTS[fault]
    monkeypatch.setattr(owner, name, what)
    with pytest.raises(AssertionError):
        test()


def test_without_a_fault_the_laws_hold():
    for solver in (Fista(), Swaps(), PerspectiveBound(20), Chain((Admm(), ConjugateGradients()))):
        check_solver(solver, examples=8)
