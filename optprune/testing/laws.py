"""The laws a solver keeps on a problem it accepts, each a plain function that raises AssertionError with the reason.

No law asks the solver whether it succeeded. What a solver promises beforehand (`exact`, `monotone`) it is held to,
whatever it says afterwards. Comparisons are written so that NaN fails them.

Tolerances. A float64 answer must have the optimal objective to 1e-8 relative, a float32 answer to 1e-4. Next to that
stands `rounding`, the size of one rounding of the sums that an objective is made of (quadratic.py): it is about
1e-15 (float32: 1e-6) of the loss constant, and it only decides where the optimum itself is that close to zero.
"""

from collections.abc import Callable

import torch

from optprune.errors import NoSolver, NumericalError
from optprune.problems import Problem
from optprune.solvers import AnySolver, solve
from optprune.solvers.run import CONTRADICTED
from optprune.testing.answers import RELATIVE, answer, named, output_change, tolerance
from optprune.testing.exact_objective import exact_objective
from optprune.testing.invariance_laws import INVARIANCE_LAWS
from optprune.testing.quadratic import clearly_regular, rounding
from optprune.testing.references import reference
from optprune.testing.transformations import random_feasible


def feasible(problem: Problem, solver: AnySolver) -> None:
    """The answer is feasible, as the problem measures it."""
    solution = answer(problem, solver)
    violation = problem.violation(solution.value)
    assert torch.isfinite(solution.value).all(), f"{named(problem, solver)}: the answer holds NaN or infinity"
    assert violation == 0, f"{named(problem, solver)}: the answer violates the constraints by {violation}"
    assert solution.violation == violation, f"{named(problem, solver)}: the solution reports another violation"


def measured_by_the_problem(problem: Problem, solver: AnySolver) -> None:
    """The objective of the solution is the one the problem measures, and it is finite."""
    solution = answer(problem, solver)
    objective = problem.objective(solution.value)
    assert abs(objective) < torch.inf, f"{named(problem, solver)}: the answer has objective {objective}"
    assert solution.objective == objective, f"{named(problem, solver)}: {solution.objective} was not measured"


def no_worse_than_the_start(problem: Problem, solver: AnySolver) -> None:
    """A monotone solver never makes a feasible start worse, be it the problem's own or any other."""
    if not solver.monotone(problem):
        return
    other = random_feasible(problem, 0)
    # Without a start, `solve` takes the problem's own, so that one is solved already.
    for start, solution in ((problem.start(), answer(problem, solver)), (other, solve(problem, solver, start=other))):
        before = problem.objective(start)
        slack = rounding(problem.loss, start) + rounding(problem.loss, solution.value)
        assert solution.objective <= before + slack, (
            f"{named(problem, solver)}: it made its start worse, from {before} to {solution.objective}"
        )


def never_below_the_reference(problem: Problem, solver: AnySolver) -> None:
    """No feasible answer is better than the optimum: else the problem or the reference measures wrongly."""
    solution, best = answer(problem, solver), reference(problem)
    slack = tolerance(problem, best.optimum) + best.rounding + rounding(problem.loss, solution.value)
    assert solution.objective >= best.optimum - slack, (
        f"{named(problem, solver)}: its objective {solution.objective} is below the optimum {best.optimum}"
    )


def bounds_hold(problem: Problem, solver: AnySolver) -> None:
    """A certificate's lower bound is not above the best weights that the reference found, nor above the answer.

    Nothing is allowed for rounding: objectives are those of the stored numbers in extended precision.
    """
    solution, best = answer(problem, solver), reference(problem)
    if solution.certificate is None:
        return
    bound = solution.certificate.lower_bound
    for weight in (best.weight, solution.value):
        if weight is not None and (weight is best.weight or solution.violation == 0):
            attained = exact_objective(problem, weight)
            assert bound <= attained, (
                f"{named(problem, solver)}: it claims the lower bound {bound}, but {attained} is attained"
            )


def bounds_are_not_contradicted(problem: Problem, solver: AnySolver) -> None:
    """No lower bound is above the objective of the answer itself: at any size, without a reference."""
    solution = answer(problem, solver)
    dropped = [note for note in solution.notes if note.startswith(CONTRADICTED)]
    assert not dropped, f"{named(problem, solver)}: it claims a lower bound that its answer contradicts: {dropped[0]}"
    if solution.certificate is not None and solution.violation == 0:
        bound = solution.certificate.lower_bound
        assert bound <= solution.objective, (
            f"{named(problem, solver)}: it claims the lower bound {bound}, but attains {solution.objective}"
        )


def exact_meets_the_reference(problem: Problem, solver: AnySolver) -> None:
    """An exact solver stops by its own rule and attains the optimum."""
    if not solver.exact(problem):
        return
    solution, best = answer(problem, solver), reference(problem)
    assert solution.status.name == "CONVERGED", f"{named(problem, solver)}: exact, but it stopped: {solution.status}"
    slack = tolerance(problem, best.optimum) + best.rounding
    assert solution.objective <= best.optimum + slack, (
        f"{named(problem, solver)}: exact, but its objective is {solution.objective} and the optimum {best.optimum}"
    )


def keeps_the_promised_gap(problem: Problem, solver: AnySolver) -> None:
    """A solver that promises a relative gap is that close to the optimum, and its certificate proves it."""
    promised = solver.promised_gap(problem)
    if promised is None:
        return
    solution, best = answer(problem, solver), reference(problem)
    share = promised + RELATIVE[problem.loss.weight.dtype]
    slack = best.rounding + rounding(problem.loss, solution.value)
    assert solution.objective <= best.optimum + share * abs(best.optimum) + slack, (
        f"{named(problem, solver)}: it promises {promised}, but its objective is {solution.objective} "
        f"and the optimum {best.optimum}"
    )
    assert solution.certificate is not None, f"{named(problem, solver)}: it promises a gap and proves none"
    gap = solution.objective - solution.certificate.lower_bound
    assert gap <= share * abs(solution.objective) + slack, (
        f"{named(problem, solver)}: it promises {promised}, but proves a gap of {gap} at {solution.objective}"
    )


def warm_start_stops(problem: Problem, solver: AnySolver) -> None:
    """An exact solver that starts from its own answer stops at once (at most one step) and returns the same."""
    if not solver.exact(problem):
        return
    first = answer(problem, solver)
    second = solve(problem, solver, start=first.value.clone())
    assert second.steps <= 1, f"{named(problem, solver)}: it took {second.steps} steps from its own answer"
    # Two points within e of the least of a convex quadratic are within 8 e of each other in its own squared norm.
    slack = tolerance(problem, first.objective) + rounding(problem.loss, first.value)
    apart = output_change(problem.loss, first.value, second.value)
    assert apart <= 8 * slack, f"{named(problem, solver)}: it leaves its own answer, by {apart} in mean square output"


def inputs_unchanged(problem: Problem, solver: AnySolver) -> None:
    """Solving changes neither the problem, nor the start, nor the global random state, bit for bit."""
    start = random_feasible(problem, 2)
    copy, before, outside = start.clone(), problem.fingerprint(), torch.get_rng_state()
    # A state that no solver would seed by itself: one that always seeds with 0 would be caught only once.
    torch.manual_seed(0x0DD5EED)
    state = torch.get_rng_state()
    try:
        solve(problem, solver, start=start)
        random_state = torch.get_rng_state()
    finally:
        torch.set_rng_state(outside)
    assert problem.fingerprint() == before, f"{named(problem, solver)}: it changed the problem"
    assert torch.equal(start, copy), f"{named(problem, solver)}: it changed its start"
    assert torch.equal(random_state, state), f"{named(problem, solver)}: it touched the global random state"


def like_the_weight(problem: Problem, solver: AnySolver) -> None:
    """The answer has the shape, the dtype and the device of the weight, and shares no memory with it."""
    value, weight = answer(problem, solver).value, problem.loss.weight
    for what in ("shape", "dtype", "device"):
        found, wanted = getattr(value, what), getattr(weight, what)
        assert found == wanted, f"{named(problem, solver)}: the answer's {what} is {found}, the weight's {wanted}"
    assert value.data_ptr() != weight.data_ptr(), f"{named(problem, solver)}: the answer is the original weight itself"
    assert not value.requires_grad, f"{named(problem, solver)}: the answer drags a gradient along"


def repeatable(problem: Problem, solver: AnySolver) -> None:
    """The same problem gives the same answer, bit for bit, whatever the global random state."""
    first = answer(problem, solver)
    state = torch.get_rng_state()
    torch.manual_seed(int(state[0]) + 1)
    try:
        second = solve(problem, solver)
    finally:
        torch.set_rng_state(state)
    assert torch.equal(first.value, second.value), f"{named(problem, solver)}: it gives different answers"
    assert first.notes == second.notes, f"{named(problem, solver)}: it gives different notes"


SOLVER_LAWS: tuple[Callable[[Problem, AnySolver], None], ...] = (
    feasible,
    measured_by_the_problem,
    no_worse_than_the_start,
    never_below_the_reference,
    bounds_hold,
    bounds_are_not_contradicted,
    exact_meets_the_reference,
    keeps_the_promised_gap,
    warm_start_stops,
    inputs_unchanged,
    like_the_weight,
    repeatable,
    *INVARIANCE_LAWS,
)


def keep_laws(problem: Problem, solver: AnySolver) -> None:
    """Every law of a solver on a problem it accepts; NumericalError is an answer where A really is singular."""
    if refused_as_singular(problem, solver):
        return
    for law in SOLVER_LAWS:
        law(problem, solver)


def refused_as_singular(problem: Problem, solver: AnySolver) -> bool:
    """Whether the solver raises NumericalError, which it may only where A is no better than singular."""
    try:
        answer(problem, solver)
    except NumericalError as error:
        assert not clearly_regular(problem.loss), f"{named(problem, solver)}: A is regular, but it raised: {error}"
        return True
    return False


def refuse(problem: Problem, solver: AnySolver) -> None:
    """A refused problem raises NoSolver with the solver's reason, and the reason is a sentence."""
    reason = solver.refusal(problem)
    assert reason, f"{named(problem, solver)}: it refuses without a reason"
    try:
        solve(problem, solver)
    except NoSolver as error:
        assert reason in str(error), f"{named(problem, solver)}: NoSolver does not say why: {error}"
    else:
        raise AssertionError(f"{named(problem, solver)}: it refuses ({reason}) and yet solves")
