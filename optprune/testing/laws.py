"""The laws a solver keeps on a problem it accepts, each a plain function that raises AssertionError with the reason.

No law relies on the solver's status. A promise (`exact`, `monotone`) is checked, whatever the status. Comparisons are
written so that NaN fails them.

Tolerances. A float64 answer must have the optimal objective to 1e-8 relative, a float32 answer to 1e-4. Next to that
stands `rounding`, the size of one rounding of the sums that an objective is made of (quadratic.py): it is about
1e-15 (float32: 1e-6) of the loss constant, and it only decides where the optimum itself is that close to zero.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from optprune.errors import InputError, NoSolver, NumericalError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import Pattern
from optprune.penalties import NormPenalty, Penalty
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem, SelectionProblem
from optprune.solvers import AnySolver, Solution, solve
from optprune.solvers.run import CONTRADICTED
from optprune.testing.quadratic import clearly_regular, exact_objective, rounding
from optprune.testing.references import reference
from optprune.testing.transformations import in_units, permuted, random_feasible, renaming, scaled

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""the promised relative accuracy of an exact answer, by dtype"""
_LAST: list[tuple[Problem, AnySolver, Solution]] = []


def tolerance(problem: Problem, objective: float) -> float:
    """Return by how much an objective may miss an optimum of the given size."""
    return RELATIVE[problem.loss.weight.dtype] * abs(objective)


def named(problem: Problem, solver: AnySolver) -> str:
    """Return the beginning of the sentence about a broken law."""
    return f"{solver.label} on a {problem.kind} problem"


def answer(problem: Problem, solver: AnySolver) -> Solution:
    """Return the solver's solution, computed once for all laws that only read it."""
    if _LAST and _LAST[0][0] is problem and _LAST[0][1] is solver:
        return _LAST[0][2]
    before = problem.fingerprint()
    solution = solve(problem, solver)
    # Here too, because on a changed problem another law would fail first.
    assert problem.fingerprint() == before, f"{named(problem, solver)}: it changed the problem"
    _LAST[:] = [(problem, solver, solution)]
    return solution


def output_change(loss: LayerLoss, first: Tensor, second: Tensor) -> float:
    """Return E|(V1 - V2) x*|^2 plus the part of the ridge."""
    change = first.double() - second.double()
    gram = loss.gram.double()
    return float(((change @ gram) * loss.weigh(change)).sum())


def feasible(problem: Problem, solver: AnySolver) -> None:
    """Check that the answer is feasible, as the problem measures it."""
    solution = answer(problem, solver)
    violation = problem.violation(solution.value)
    assert torch.isfinite(solution.value).all(), f"{named(problem, solver)}: the answer holds NaN or infinity"
    assert violation == 0, f"{named(problem, solver)}: the answer violates the constraints by {violation}"
    assert solution.violation == violation, f"{named(problem, solver)}: the solution reports another violation"


def measured_by_the_problem(problem: Problem, solver: AnySolver) -> None:
    """Check that the objective of the solution is the one that the problem measures, and finite."""
    solution = answer(problem, solver)
    objective = problem.objective(solution.value)
    assert abs(objective) < torch.inf, f"{named(problem, solver)}: the answer has objective {objective}"
    assert solution.objective == objective, f"{named(problem, solver)}: {solution.objective} was not measured"


def no_worse_than_the_start(problem: Problem, solver: AnySolver) -> None:
    """Check that a monotone solver makes no feasible start worse, neither the problem's own nor a random one."""
    if not solver.monotone(problem):
        return
    other = random_feasible(problem, 0)
    # Without a start `solve` takes the problem's own, so that one is solved already.
    for start, solution in ((problem.start(), answer(problem, solver)), (other, solve(problem, solver, start=other))):
        before = problem.objective(start)
        slack = rounding(problem.loss, start) + rounding(problem.loss, solution.value)
        assert solution.objective <= before + slack, (
            f"{named(problem, solver)}: it made its start worse, from {before} to {solution.objective}"
        )


def never_below_the_reference(problem: Problem, solver: AnySolver) -> None:
    """Check that no feasible answer is better than the optimum, else the problem or the reference is wrong."""
    solution, best = answer(problem, solver), reference(problem)
    slack = tolerance(problem, best.optimum) + best.rounding + rounding(problem.loss, solution.value)
    assert solution.objective >= best.optimum - slack, (
        f"{named(problem, solver)}: its objective {solution.objective} is below the optimum {best.optimum}"
    )


def bounds_hold(problem: Problem, solver: AnySolver) -> None:
    """Check that a certificate's lower bound is not above the best weights of the reference, nor above the answer.

    No rounding is allowed: objectives are those of the stored numbers in extended precision.
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
    """Check that no lower bound is above the objective of the answer, at any size, without a reference."""
    solution = answer(problem, solver)
    dropped = [note for note in solution.notes if note.startswith(CONTRADICTED)]
    assert not dropped, f"{named(problem, solver)}: it claims a lower bound that its answer contradicts: {dropped[0]}"
    if solution.certificate is not None and solution.violation == 0:
        bound = solution.certificate.lower_bound
        assert bound <= solution.objective, (
            f"{named(problem, solver)}: it claims the lower bound {bound}, but attains {solution.objective}"
        )


def exact_meets_the_reference(problem: Problem, solver: AnySolver) -> None:
    """Check that an exact solver stops by its own rule and attains the optimum."""
    if not solver.exact(problem):
        return
    solution, best = answer(problem, solver), reference(problem)
    assert solution.status.name == "CONVERGED", f"{named(problem, solver)}: exact, but it stopped: {solution.status}"
    slack = tolerance(problem, best.optimum) + best.rounding
    assert solution.objective <= best.optimum + slack, (
        f"{named(problem, solver)}: exact, but its objective is {solution.objective} and the optimum {best.optimum}"
    )


def keeps_the_promised_gap(problem: Problem, solver: AnySolver) -> None:
    """Check that a solver keeps its promised relative gap, and that its certificate proves it."""
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
    """Check that an exact solver that starts from its own answer stops after at most one step and returns the same."""
    if not solver.exact(problem):
        return
    first = answer(problem, solver)
    second = solve(problem, solver, start=first.value.clone())
    assert second.steps <= 1, f"{named(problem, solver)}: it took {second.steps} steps from its own answer"
    # Two points within e of the minimum of a convex quadratic are within 8 e of each other in its own squared norm.
    slack = tolerance(problem, first.objective) + rounding(problem.loss, first.value)
    apart = output_change(problem.loss, first.value, second.value)
    assert apart <= 8 * slack, f"{named(problem, solver)}: it leaves its own answer, by {apart} in mean square output"


def inputs_unchanged(problem: Problem, solver: AnySolver) -> None:
    """Check that solving changes neither the problem, nor the start, nor the global random state, bit for bit."""
    start = random_feasible(problem, 2)
    copy, before, outside = start.clone(), problem.fingerprint(), torch.get_rng_state()
    # A state that no solver sets by itself: a solver that always seeds with 0 would be noticed only once.
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
    """Check that the answer has the shape, the dtype and the device of the weight, and shares no memory with it."""
    value, weight = answer(problem, solver).value, problem.loss.weight
    for what in ("shape", "dtype", "device"):
        found, wanted = getattr(value, what), getattr(weight, what)
        assert found == wanted, f"{named(problem, solver)}: the answer's {what} is {found}, the weight's {wanted}"
    assert value.data_ptr() != weight.data_ptr(), f"{named(problem, solver)}: the answer is the original weight itself"
    assert not value.requires_grad, f"{named(problem, solver)}: the answer drags a gradient along"


def repeatable(problem: Problem, solver: AnySolver) -> None:
    """Check that the same problem gives the same answer, bit for bit, for every global random state."""
    first = answer(problem, solver)
    state = torch.get_rng_state()
    torch.manual_seed(int(state[0]) + 1)
    try:
        second = solve(problem, solver)
    finally:
        torch.set_rng_state(state)
    assert torch.equal(first.value, second.value), f"{named(problem, solver)}: it gives different answers"
    assert first.notes == second.notes, f"{named(problem, solver)}: it gives different notes"


UNITS = ((2.0**5, 2.0**-30), (2.0**-20, 2.0**12))
"""factors of weights and of inputs: powers of two, so that ties stay ties, and far from one"""
INPUT_UNITS = (1.0, 2.0**-30, 2.0**12, 2.0**-11)
"""factors of inputs, in turn: powers of two, which round nothing"""


def rows_are_independent(problem: Problem, solver: AnySolver) -> None:
    """Check that restoration of all rows together has the same loss as row by row."""
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
    """Return the loss of one row alone, where rows are not coupled."""
    metric = loss.metric
    if metric is not None:
        metric = OutputMetric(metric.average[row : row + 1], metric.damping[row : row + 1], metric.tokens)
    return replace(loss, weight=loss.weight[row : row + 1], metric=metric)


def permutation_is_harmless(problem: Problem, solver: AnySolver) -> None:
    """Check that an exact solver attains the same objective when inputs, outputs and units are permuted."""
    if solver.exact(problem):
        _same_objective(problem, _renamed(problem)[0], 1.0, solver, "permuted")


def scaling_is_harmless(problem: Problem, solver: AnySolver) -> None:
    """Check that an exact solver's objective scales with the units of weights and inputs."""
    if solver.exact(problem):
        for weight, inputs in UNITS:
            other = scaled(problem, weight, inputs)
            _same_objective(problem, other, (weight * inputs) ** 2, solver, f"scaled by {weight} and {inputs}")


def units_are_harmless(problem: Problem, solver: AnySolver) -> None:
    """Check that an exact solver attains the same objective when every input has its own unit."""
    # Only where the constraint is on zeros, which have no unit.
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


def permuting_permutes_the_answer(problem: Problem, solver: AnySolver) -> None:
    """Check that the answer to the permuted problem is the permuted answer, on a problem without ties."""
    other, inputs, outputs = _renamed(problem)
    back = torch.empty_like(problem.loss.weight)
    back[outputs[:, None], inputs] = solve(other, solver).value
    _same_answer(problem, solver, back, "permuted")


def scaling_scales_the_answer(problem: Problem, solver: AnySolver) -> None:
    """Check that the answer scales with the weights, for any unit of the inputs, on a problem without ties."""
    for weight, inputs in UNITS:
        back = solve(scaled(problem, weight, inputs), solver).value / weight
        _same_answer(problem, solver, back, f"scaled by {weight} and {inputs}")


def _same_answer(problem: Problem, solver: AnySolver, back: Tensor, how: str) -> None:
    found = answer(problem, solver).value
    error = float((found - back).double().norm())
    # Generic problems are well conditioned (a few hundred), so most digits of the answer are right, not only of its
    # objective; optimality alone would give the square root of the promise about the objective.
    slack = RELATIVE[problem.loss.weight.dtype] ** 0.5 * float(found.double().norm())
    assert error <= slack, f"{named(problem, solver)}: the answer moves by {error} when the problem is {how}"


GENERIC_LAWS: tuple[Callable[[Problem, AnySolver], None], ...] = (
    permuting_permutes_the_answer,
    scaling_scales_the_answer,
)
"""for solvers that do not draw at random, on problems without ties (`generic` in strategies.py)"""


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
    rows_are_independent,
    permutation_is_harmless,
    scaling_is_harmless,
    units_are_harmless,
)


def keep_laws(problem: Problem, solver: AnySolver) -> None:
    """Check every law of a solver on a problem that it accepts; NumericalError is allowed where A is singular."""
    if refused_as_singular(problem, solver):
        return
    for law in SOLVER_LAWS:
        law(problem, solver)


def refused_as_singular(problem: Problem, solver: AnySolver) -> bool:
    """Return whether the solver raises NumericalError, which it may only where A is singular within rounding."""
    try:
        answer(problem, solver)
    except InputError as error:
        raise AssertionError(f"{named(problem, solver)}: {error}") from error
    except NumericalError as error:
        assert not clearly_regular(problem.loss), f"{named(problem, solver)}: A is regular, but it raised: {error}"
        return True
    return False


def refuse(problem: Problem, solver: AnySolver) -> None:
    """Check that a refused problem raises NoSolver with the solver's reason."""
    reason = solver.refusal(problem)
    assert reason, f"{named(problem, solver)}: it refuses without a reason"
    try:
        solve(problem, solver)
    except NoSolver as error:
        assert reason in str(error), f"{named(problem, solver)}: NoSolver does not say why: {error}"
    else:
        raise AssertionError(f"{named(problem, solver)}: it refuses ({reason}), but solves the problem")


def projection_is_best(pattern: Pattern, score: Tensor) -> None:
    """Check that the projection is admissible, and that no admissible mask has a larger score (at most 2^12 masks)."""
    mask = pattern.project(score)
    assert pattern.admits(mask), f"{pattern} does not admit its own projection {mask.tolist()}"
    # Infinities would make totals NaN; larger than every finite score they have the same effect.
    finite = score.nan_to_num(posinf=1e6, neginf=-1e6)
    best = float(finite[mask].sum())
    for bits in product((False, True), repeat=score.numel()):
        other = torch.tensor(bits).reshape(score.shape)
        if pattern.admits(other):
            total = float(finite[other].sum())
            # One rounding of a sum of at most 12 scores of at most 1e6.
            assert total <= best + 1e-8, f"{pattern}: {bits} scores {total}, the projection only {best}"


def merging_is_one_pass(inputs: Tensor, dense: Tensor | None, cut: int) -> None:
    """Check that the merged moments of two parts are the moments of the whole."""
    parts = [(inputs[:cut], dense[:cut] if dense is not None else None)]
    parts.append((inputs[cut:], dense[cut:] if dense is not None else None))
    merged = InputMoments.from_samples(*parts[0]).merge(InputMoments.from_samples(*parts[1]))
    whole = InputMoments.from_samples(inputs, dense)
    assert merged.tokens == whole.tokens == inputs.shape[0], f"{merged.tokens} tokens of {inputs.shape[0]}"
    largest = max(float(inputs.abs().max()), 0.0 if dense is None else float(dense.abs().max()))
    # A few roundings of an average of numbers of this size.
    slack = 8 * torch.finfo(inputs.dtype).eps * max(largest, largest**2)
    for one, other in zip(merged.parts(), whole.parts(), strict=True):
        error = float((one - other).abs().max())
        assert error <= slack, f"merged moments differ from one pass by {error}"


def value_is_the_mean_over_samples(loss: LayerLoss, weight: Tensor, inputs: Tensor, dense: Tensor | None) -> None:
    """Check that f(V) is half the mean squared output error over the samples, plus the ridge towards W."""
    actual = inputs.double()
    ideal = actual if dense is None else dense.double()
    new, old = weight.double(), loss.weight.double()
    error = actual @ new.T - ideal @ old.T
    if loss.fit_bias:
        error = error + loss.bias_change(weight).double()
    literal = float(error.square().sum(1).mean()) / 2
    literal += float(((new - old).square() * loss.damping.double()).sum()) / 2
    found = loss.value(weight)
    slack = 1e-12 * literal + rounding(loss, weight)
    assert abs(found - literal) <= slack, f"the loss says {found}, the samples say {literal}"


STEPS = (1e-3, 1.0, 50.0)
"""steps of proximal operators that the laws of penalties are tried with"""


def prox_attains_fenchels_equality(penalty: Penalty, weight: Tensor) -> None:
    """Check that P(p) + P*(u) = <p, u> at the proximal point p of V, u = (V - p) / step: for no other p it holds."""
    for size in STEPS:
        nearest = penalty.prox(weight, torch.tensor(size).to(weight))
        dual = (weight - nearest) / size
        # The rounding of u is that of V over the step. P* is infinite just outside its domain, so u is moved inwards.
        rounded = 1e-14 * float(weight.abs().max()) / size
        inside = (dual - dual.clamp(-rounded, rounded)) * (1 - 1e-12)
        wanted = float((nearest * dual).sum()) - penalty.conjugate(inside)
        found = penalty.value(nearest)
        # The gradient of P* at u is p, which bounds the effect of the move.
        slack = 1e-11 + 1e-9 * abs(wanted) + 2 * rounded * float(nearest.abs().sum())
        assert abs(found - wanted) <= slack, (
            f"{penalty}: for a step of {size} P(p) is {found}, but <p, u> - P*(u) is {wanted}"
        )


def no_point_beats_the_proximal_point(penalty: Penalty, weight: Tensor) -> None:
    """Check that no other point has a smaller P(U) + |U - V|^2 / (2 step) than the proximal point."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    for size in STEPS:
        nearest = penalty.prox(weight, torch.tensor(size).to(weight))
        best = penalty.value(nearest) + float((nearest - weight).square().sum()) / (2 * size)
        others = [weight, torch.zeros_like(weight), 0.9 * nearest, 1.1 * nearest]
        others += [nearest + scale * noise for scale in (1e-4, 1e-2, 1.0)]
        for other in others:
            cost = penalty.value(other) + float((other - weight).square().sum()) / (2 * size)
            # A few roundings of sums of a dozen terms.
            assert cost >= best - 1e-13 * (1 + best), f"{penalty}: a point costs {cost}, the proximal point {best}"


def separable_entries_are_independent(penalty: Penalty, weight: Tensor) -> None:
    """Check that a separable penalty is a sum over entries, and takes a step for each column or entry."""
    if not penalty.separable:
        return
    entries = torch.diag_embed(weight.reshape(-1)).reshape(-1, *weight.shape)
    apart, together = sum(map(penalty.value, entries)), penalty.value(weight)
    assert abs(apart - together) <= 1e-12 * together, f"{penalty}: {together} in all, but {apart} entry by entry"
    each = torch.linspace(0.5, 2.0, weight.numel()).to(weight).reshape(weight.shape)
    for steps in (each, each[0]):
        moved = penalty.prox(weight, steps)
        for row, column in product(*map(range, weight.shape)):
            alone = penalty.prox(weight, steps.expand(weight.shape)[row, column])[row, column]
            assert torch.equal(moved[row, column], alone), (
                f"{penalty}: entry {row}, {column} depends on the steps of the others"
            )


def conjugate_bounds_inner_products(penalty: Penalty, weight: Tensor) -> None:
    """Check that <T, V> <= P(V) + P*(T): else certificates are wrong."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    for dual in (weight, noise):
        bound = penalty.conjugate(dual)
        for scale in (0.1, 1.0, 10.0):
            for other in (scale * noise, scale * weight):
                inner = float((dual * other).sum())
                total = bound + penalty.value(other)
                assert total >= inner - 1e-12 * (1 + abs(inner)), f"{penalty}: <T, V> = {inner} > P + P* = {total}"


def dual_norm_is_the_gauge(penalty: Penalty, weight: Tensor) -> None:
    """Check that a norm's dual norm bounds <T, V> / P(V) and is attained, and that the conjugate is 0 just within it.

    It is attained where the proximal point p of T is not zero: T - p then has the dual norm 1.
    """
    if not isinstance(penalty, NormPenalty):
        return
    gauge = penalty.dual_norm(weight)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    for other in (weight, weight.sign(), noise):
        inner, most = float((weight * other).sum()), gauge * penalty.value(other)
        assert not inner > most * (1 + 1e-12), f"{penalty}: <T, V> = {inner} is above dual norm x P(V) = {most}"
    assert penalty.conjugate(torch.zeros_like(weight)) == 0, f"{penalty}: the conjugate at zero is not zero"
    if not 0 < gauge < torch.inf:
        return
    assert penalty.conjugate(weight / gauge) == 0, f"{penalty}: the conjugate is not zero on the unit ball"
    assert penalty.conjugate(1.001 * weight / gauge) == torch.inf, f"{penalty}: the conjugate is finite off the ball"
    twice = 2 * weight / gauge
    nearest = penalty.prox(twice, torch.ones(()).to(weight))
    assert bool(nearest.any()), f"{penalty}: a point of dual norm 2 has the proximal point 0"
    attained = penalty.dual_norm(twice - nearest)
    assert abs(attained - 1) <= 1e-12 * max(1.0, float(twice.abs().max())), (
        f"{penalty}: the dual norm of a point of the unit sphere is {attained}"
    )


def values_are_convex(penalty: Penalty, weight: Tensor) -> None:
    """Check that P is convex and zero at zero, and that a norm scales with the size of its argument."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    assert penalty.value(torch.zeros_like(weight)) == 0, f"{penalty}: the value at zero is not zero"
    for factor in (-3.0, 0.1, 1.0):
        other = factor * noise
        middle = penalty.value(0.5 * weight + 0.5 * other)
        mean = (penalty.value(weight) + penalty.value(other)) / 2
        assert middle <= mean * (1 + 1e-12), f"{penalty}: the value of a mean, {middle}, is above the mean {mean}"
        if isinstance(penalty, NormPenalty):
            scaled_value, wanted = penalty.value(factor * weight), abs(factor) * penalty.value(weight)
            assert abs(scaled_value - wanted) <= 1e-12 * wanted, f"{penalty}: {factor} V has the value {scaled_value}"


def reach_bounds_weights(penalty: Penalty, weight: Tensor) -> None:
    """Check that no weight is larger than `reach` for its value."""
    size = torch.linspace(0.5, 2.0, weight.numel()).to(weight).reshape(weight.shape)
    norm, most = float((weight * size).norm()), penalty.reach(penalty.value(weight), size)
    # The bound is infinite or NaN where the strength is zero.
    assert not norm > most * (1 + 1e-12), f"{penalty}: a weight of size {norm} is beyond its reach, {most}"


def prox_keeps_the_dtype(penalty: Penalty, weight: Tensor) -> None:
    """Check that the proximal point of a float32 weight is the one in float64, rounded."""
    single = weight.float()
    nearest = penalty.prox(single, torch.ones((), device=weight.device))
    assert nearest.dtype == torch.float32, f"{penalty}: the proximal point of a float32 weight is {nearest.dtype}"
    exact = penalty.prox(single.double(), torch.ones((), dtype=torch.float64, device=weight.device))
    assert torch.allclose(nearest.double(), exact, atol=1e-6), f"{penalty}: float32 and float64 differ"


PENALTY_LAWS: tuple[Callable[[Penalty, Tensor], None], ...] = (
    prox_attains_fenchels_equality,
    no_point_beats_the_proximal_point,
    separable_entries_are_independent,
    conjugate_bounds_inner_products,
    dual_norm_is_the_gauge,
    values_are_convex,
    reach_bounds_weights,
    prox_keeps_the_dtype,
)
