"""The ridge of the last refit, chosen layer by layer on held-out tokens, which then join the tokens fitted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.problems import LayerLoss, Problem
from optprune.solvers import Chain, ConjugateGradients, Restore, Solution, Solver, choose, solve
from optprune.solvers.run import answer
from optprune.solvers.solution import Record


@dataclass(frozen=True)
class Refitted:
    """A layer's answer refitted under the ridge that the held-out tokens chose."""

    problem: Problem
    """with that ridge, over the tokens it was fitted on in the end"""
    solution: Solution
    held_out_error: float
    """E|V x* - W x|^2 / E|W x|^2 on the held-out tokens, of the answer that knew nothing of them"""


def refitting(solver: Solver) -> Solver | None:
    """The refit that a solver ends with; None where it ends with anything else."""
    last = solver.stages[-1] if isinstance(solver, Chain) and solver.stages else solver
    return last if isinstance(last, Restore | ConjugateGradients) else None


def held_out_loss(loss: LayerLoss, held_out: InputMoments) -> LayerLoss:
    """The same loss over held-out tokens, without a ridge."""
    return LayerLoss.of(loss.weight, held_out, fit_bias=loss.fit_bias, metric=loss.metric)


def refit(
    problem: Problem,
    solution: Solution,
    held_out: InputMoments,
    dampings: Sequence[float],
    solver: Solver | None = None,
    *,
    join: bool = True,
) -> Refitted:
    """Refit an answer on its support under each damping, and keep the one with the least loss on held-out tokens.

    The loss is that of the problem, with its output metric, and without a ridge; a damping is a share of the mean
    diagonal of the Gram matrix, as in a recipe. `solver` is what gave the answer: the refit is its last stage. With
    `join` the held-out tokens are then fitted too, under the ridge they chose. Costs a refit for each damping and one
    more. The lower bound of the answer, if it had one, does not survive. Raises InputError where the solver that the
    problem chooses ends without a refit.
    """
    loss, last = problem.loss, refitting(choose(problem) if solver is None else solver)
    if last is None:
        raise InputError(
            f"refit_damping needs a refit at the end, and a {problem.kind} problem is solved without one: "
            "name a solver that ends with restore or conjugate_gradients"
        )
    apart = held_out_loss(loss, held_out)
    problems = [replace(problem, loss=loss.damped(damping)) for damping in dampings]
    values, value = list[Tensor](), solution.value
    for damped in problems:
        # A path: each answer is near the one before.
        value = answer(damped, last, value)
        values.append(value)
    losses = [apart.value(value) for value in values]
    best = losses.index(min(losses))
    fitted = problems[best]
    if join:
        joined = replace(loss, moments=loss.moments.merge(held_out)).damped(dampings[best])
        fitted = replace(problem, loss=joined)
    refitted = solve(fitted, last, start=values[best])
    record = Record("before the refit", solution.steps, solution.seconds, fitted.objective(solution.value))
    return Refitted(
        fitted,
        replace(
            refitted,
            certificate=None,
            history=(*solution.history, record),
            notes=(*solution.notes, *refitted.notes),
        ),
        apart.relative_error(values[best]),
    )
