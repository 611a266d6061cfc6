"""No lower bound is above any feasible weight, with no allowance for rounding: objectives in extended precision."""

import pytest

from optprune.solvers import solve
from optprune.testing.quadratic import exact_objective
from tests.helpers.bound_cases import SOLVERS, case, good_points


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 60), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", SOLVERS)
def test_no_bound_exceeds_a_point(kind, seeds):
    for seed in seeds:
        problem = case(kind, seed)
        proved = [
            solve(problem, solver) for solver in SOLVERS[kind] if solver.refusal(problem.in_output_basis()[0]) is None
        ]
        points = [solution.value for solution in proved] + list(good_points(problem))
        least = min(exact_objective(problem, point) for point in points)
        for solution in proved:
            if solution.certificate is not None:
                assert 0 <= solution.certificate.lower_bound <= least, f"seed {seed}"
                assert solution.gap >= 0, f"seed {seed}"
