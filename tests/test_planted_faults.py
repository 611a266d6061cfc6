"""The laws bite: every fault planted here must be found, on the problems that the strategies draw."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from optprune.problems import LinkedLeastSquares, MaskedLeastSquares, Problem
from optprune.solvers import Answer, Certificate, DirectSolver, FaspMetric, Restore
from optprune.solvers import restore as restore_module
from optprune.testing import STRATEGIES, keep_laws, laws

Fault = Callable[[MaskedLeastSquares, Tensor], Tensor]


@final
@dataclass(frozen=True)
class FaultyRestore(DirectSolver):
    """Restoration that claims to be exact, with its answer spoiled."""

    fault: Fault

    def why_not(self, problem: Problem) -> str | None:
        return Restore().why_not(problem) or (None if isinstance(problem, MaskedLeastSquares) else "not restoration")

    def exact(self, problem: Problem) -> bool:
        return True

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        assert isinstance(problem, MaskedLeastSquares)
        return Answer(self.fault(problem, Restore().answer(problem, start).value))


def _step_flipped(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return 2 * problem.start() - answer


def _step_halved(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return (problem.start() + answer) / 2


def _start_returned(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return problem.start()


def _damping_dropped(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    undamped = replace(problem, loss=problem.loss.damped(0.0))
    return Restore().answer(undamped, answer).value


def _damping_towards_zero(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    # The ridge of most implementations: it shrinks the weight instead of its change.
    loss = problem.loss
    target = loss.target - loss.weight * loss.damping
    value = torch.zeros_like(answer)
    for row, kept in enumerate(problem.mask.expand_as(answer)):
        inverse = torch.linalg.pinv(loss.gram[kept][:, kept], hermitian=True)
        value[row, kept] = target[row, kept] @ inverse
    return value


def _dense_inputs_forgotten(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    loss = replace(problem.loss, moments=replace(problem.loss.moments, dense=None))
    return Restore().answer(replace(problem, loss=loss), answer).value


def _bias_forgotten(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return Restore().answer(replace(problem, loss=replace(problem.loss, fit_bias=False)), answer).value


def _mask_inverted(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return Restore().answer(replace(problem, mask=~problem.mask), answer).value


def _first_row_everywhere(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return answer[:1].repeat(answer.shape[0], 1) * problem.mask


def _not_a_number(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return torch.full_like(answer, torch.nan)


def _other_dtype(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return answer.float()


def _noise(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    return answer + 1e-3 * torch.randn_like(answer) * problem.mask


def _weight_overwritten(problem: MaskedLeastSquares, answer: Tensor) -> Tensor:
    problem.loss.weight.copy_(answer)
    return answer


FAULTS: list[tuple[Fault, Callable]] = [
    (_step_flipped, laws.no_worse_than_the_start),
    (_step_flipped, laws.exact_meets_the_reference),
    (_step_halved, laws.exact_meets_the_reference),
    (_start_returned, laws.exact_meets_the_reference),
    (_damping_dropped, laws.exact_meets_the_reference),
    (_damping_towards_zero, laws.exact_meets_the_reference),
    (_dense_inputs_forgotten, laws.exact_meets_the_reference),
    (_bias_forgotten, laws.exact_meets_the_reference),
    (_mask_inverted, laws.feasible),
    (_first_row_everywhere, laws.exact_meets_the_reference),
    (_first_row_everywhere, laws.rows_are_independent),
    (_not_a_number, laws.measured_by_the_problem),
    (_not_a_number, laws.exact_meets_the_reference),
    (_other_dtype, laws.like_the_weight),
    (_noise, laws.repeatable),
    (_noise, laws.inputs_unchanged),
    (_weight_overwritten, laws.inputs_unchanged),
]


def _breaks(law: Callable[[Problem, DirectSolver], None], kind: type[Problem], solver: DirectSolver) -> None:
    # The first broken example is enough: shrinking it would be most of the time.
    @settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[kind](generic=True))
    def check(problem: Problem) -> None:
        law(problem, solver)

    with pytest.raises(AssertionError, match=solver.label):
        check()


@pytest.mark.parametrize(("fault", "law"), FAULTS, ids=lambda part: part.__name__.strip("_"))
def test_a_spoiled_restoration_breaks_the_law(fault, law):
    _breaks(law, MaskedLeastSquares, FaultyRestore(fault))


@pytest.mark.parametrize("fault", {fault: None for fault, _ in FAULTS}, ids=lambda part: part.__name__.strip("_"))
def test_no_spoiled_restoration_keeps_all_laws(fault):
    _breaks(keep_laws, MaskedLeastSquares, FaultyRestore(fault))


@pytest.mark.parametrize("excess", [0.1, 1e-6])
def test_a_bound_that_is_a_little_too_high_breaks_the_law(excess):
    @final
    @dataclass(frozen=True)
    class Boastful(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return None

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            found = Restore().answer(problem, start)
            assert found.certificate is not None
            bound = found.certificate.lower_bound
            return replace(found, certificate=Certificate(bound + excess * problem.loss.constant, "wishful thinking"))

    _breaks(laws.bounds_hold, MaskedLeastSquares, Boastful())


def test_the_bound_of_one_choice_is_no_bound_of_the_best_choice():
    @final
    @dataclass(frozen=True)
    class OneChoice(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return None

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            assert isinstance(problem, LinkedLeastSquares)
            return Restore().answer(problem.restrict(problem.support(start)), start)

    _breaks(laws.bounds_hold, LinkedLeastSquares, OneChoice())


def test_too_many_units_break_the_law():
    @final
    @dataclass(frozen=True)
    class OneTooMany(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return None

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            return Answer(problem.loss.weight.clone())

    _breaks(laws.feasible, LinkedLeastSquares, OneTooMany())


def test_a_heuristic_that_claims_to_be_exact_breaks_the_law():
    @final
    @dataclass(frozen=True)
    class Boastful(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return None

        def exact(self, problem: Problem) -> bool:
            return True

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            return FaspMetric().answer(problem, start)

    _breaks(laws.exact_meets_the_reference, LinkedLeastSquares, Boastful())


def test_an_absolute_threshold_breaks_the_law_of_scaling():
    @final
    @dataclass(frozen=True)
    class Absolute(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return None

        def exact(self, problem: Problem) -> bool:
            return True

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            found = Restore().answer(problem, start)
            return replace(found, value=torch.where(found.value.abs() > 1e-3, found.value, 0.0))

    _breaks(laws.scaling_is_harmless, MaskedLeastSquares, Absolute())


def test_a_flipped_sign_inside_the_solver_breaks_the_laws(monkeypatch):
    step = restore_module._newton_step

    def flipped(*arguments):
        change, singular = step(*arguments)
        return -change, singular

    monkeypatch.setattr(restore_module, "_newton_step", flipped)
    _breaks(keep_laws, MaskedLeastSquares, Restore())


def test_a_refusal_without_a_reason_breaks_the_law():
    @final
    @dataclass(frozen=True)
    class Silent(DirectSolver):
        def why_not(self, problem: Problem) -> str | None:
            return ""

        def answer(self, problem: Problem, start: Tensor) -> Answer:
            return Answer(start)

    _breaks(laws.refuse, MaskedLeastSquares, Silent())
