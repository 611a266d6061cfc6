"""The laws about problems that differ in names, units and rows only: the answers must differ as little."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem, SelectionProblem
from optprune.solvers import AnySolver, solve
from optprune.testing.answers import RELATIVE, answer, named, tolerance
from optprune.testing.quadratic import rounding
from optprune.testing.transformations import in_units, permuted, renaming, scaled

UNITS = ((2.0**5, 2.0**-30), (2.0**-20, 2.0**12))
"""factors of weights and of inputs: powers of two, so that ties stay ties, and far from one"""
INPUT_UNITS = (1.0, 2.0**-30, 2.0**12, 2.0**-11)
"""factors of inputs, in turn: powers of two, which round nothing"""


def rows_are_independent(problem: Problem, solver: AnySolver) -> None:
    """Restoration of all rows together costs what restoring them one by one costs."""
    if not (isinstance(problem, MaskedLeastSquares) and solver.exact(problem)) or problem.loss.coupled:
        return
    loss, together = problem.loss, answer(problem, solver)
    apart = 0.0
    slack = rounding(loss, together.value)
    for row in range(loss.weight.shape[0]):
        own = problem.mask if problem.mask.shape[0] == 1 else problem.mask[row : row + 1]
        single = MaskedLeastSquares(_row(loss, row), own)
        solution = solve(single, solver)
        apart += solution.objective
        slack += rounding(single.loss, solution.value)
    assert abs(apart - together.objective) <= tolerance(problem, apart) + slack, (
        f"{named(problem, solver)}: {together.objective} for all rows together, but {apart} row by row"
    )


def _row(loss: LayerLoss, row: int) -> LayerLoss:
    """The loss of one row alone, where rows are not coupled."""
    metric = loss.metric
    if metric is not None:
        metric = OutputMetric(metric.average[row : row + 1], metric.damping[row : row + 1], metric.tokens)
    return replace(loss, weight=loss.weight[row : row + 1], metric=metric)


def permutation_is_harmless(problem: Problem, solver: AnySolver) -> None:
    """An exact solver attains the same objective when inputs, outputs and units are named in another order."""
    if solver.exact(problem):
        _same_objective(problem, _renamed(problem)[0], 1.0, solver, "permuted")


def scaling_is_harmless(problem: Problem, solver: AnySolver) -> None:
    """An exact solver's objective scales, and nothing else, when weights and inputs come in other units."""
    if solver.exact(problem):
        for weight, inputs in UNITS:
            other = scaled(problem, weight, inputs)
            _same_objective(problem, other, (weight * inputs) ** 2, solver, f"scaled by {weight} and {inputs}")


def units_are_harmless(problem: Problem, solver: AnySolver) -> None:
    """An exact solver attains the same objective when every input comes in a unit of its own."""
    # Where the constraint is on zeros, which have no unit.
    if solver.exact(problem) and isinstance(problem, MaskedLeastSquares | SelectionProblem):
        units = torch.tensor(INPUT_UNITS).repeat(problem.loss.weight.shape[1])[: problem.loss.weight.shape[1]]
        other = replace(problem, loss=in_units(problem.loss, units))
        _same_objective(problem, other, 1.0, solver, f"given in the units {list(INPUT_UNITS)} of its inputs")


def _renamed(problem: Problem) -> tuple[Problem, Tensor, Tensor]:
    inputs, outputs = renaming(problem)
    return permuted(problem, inputs, outputs), inputs, outputs


def _same_objective(problem: Problem, other: Problem, factor: float, solver: AnySolver, how: str) -> None:
    first, second = answer(problem, solver), solve(other, solver)
    back = second.objective / factor
    slack = tolerance(problem, first.objective)
    slack += rounding(problem.loss, first.value) + rounding(other.loss, second.value) / factor
    assert abs(back - first.objective) <= slack, (
        f"{named(problem, solver)}: the objective {first.objective} becomes {back} when the problem is {how}"
    )


INVARIANCE_LAWS: tuple[Callable[[Problem, AnySolver], None], ...] = (
    rows_are_independent,
    permutation_is_harmless,
    scaling_is_harmless,
    units_are_harmless,
)


def permuting_permutes_the_answer(problem: Problem, solver: AnySolver) -> None:
    """On a problem without ties the answer to the renamed problem is the renamed answer."""
    other, inputs, outputs = _renamed(problem)
    back = torch.empty_like(problem.loss.weight)
    back[outputs[:, None], inputs] = solve(other, solver).value
    _same_answer(problem, solver, back, "permuted")


def scaling_scales_the_answer(problem: Problem, solver: AnySolver) -> None:
    """On a problem without ties the answer scales with the weights, whatever the unit of the inputs."""
    for weight, inputs in UNITS:
        back = solve(scaled(problem, weight, inputs), solver).value / weight
        _same_answer(problem, solver, back, f"scaled by {weight} and {inputs}")


def _same_answer(problem: Problem, solver: AnySolver, back: Tensor, how: str) -> None:
    found = answer(problem, solver).value
    error = float((found - back).double().norm())
    # Generic problems are well conditioned (a few hundred), which leaves most digits of the answer, not only of its
    # objective; the square root of the promise about the objective is what optimality alone would give.
    slack = RELATIVE[problem.loss.weight.dtype] ** 0.5 * float(found.double().norm())
    assert error <= slack, f"{named(problem, solver)}: the answer moves by {error} when the problem is {how}"


GENERIC_LAWS: tuple[Callable[[Problem, AnySolver], None], ...] = (
    permuting_permutes_the_answer,
    scaling_scales_the_answer,
)
"""for solvers that do not draw at random, on problems without ties (`generic` in strategies.py)"""
