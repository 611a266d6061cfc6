"""Problems under an output metric: accepted pairs keep the laws, refused ones say why."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.problems import MaskedLeastSquares, SparseLeastSquares
from optprune.solvers import Chain, Restore, RoundToNearest, SparseGpt, Swaps
from optprune.testing import laws
from optprune.testing.strategies import METRIC_KINDS, weighted
from tests.helpers.solver_table import ACCEPTED, AT_RANDOM, DTYPES, KINDS, by_pair, by_solver, in_order

EXAMPLES = max(settings().max_examples // 7, 1)
WEIGHTED = [kind for kind in METRIC_KINDS if kind != "none"]

by_metric = pytest.mark.parametrize("metric", WEIGHTED)

# A metric that couples rows is refused by what works row by row; nothing else is refused because of a metric.
ROW_BY_ROW = (RoundToNearest, SparseGpt, Swaps)


def is_accepted(problem, solver):
    """What the table for problems without a metric says, less what works row by row where rows are coupled."""
    if (type(problem).__name__, solver.label) not in ACCEPTED:
        return False
    if not problem.loss.coupled:
        return True
    own_masks = isinstance(problem, SparseLeastSquares | MaskedLeastSquares)
    own_masks &= (problem.mask if isinstance(problem, MaskedLeastSquares) else problem.loss.weight).shape[0] > 1
    row_by_row = (*ROW_BY_ROW, Restore) if own_masks else ROW_BY_ROW
    stages = solver.stages if isinstance(solver, Chain) else (solver,)
    return not any(isinstance(stage, row_by_row) for stage in stages)


@by_pair
@by_metric
def test_accepted_problems_keep_the_laws_and_refused_ones_say_why(kind, metric, solver):
    @settings(max_examples=EXAMPLES)
    @given(st.sampled_from(DTYPES).flatmap(lambda dtype: weighted(kind, metric, dtype=dtype)))
    def check(problem):
        accepted = is_accepted(problem, solver)
        assert (solver.refusal(problem) is None) == accepted
        (laws.keep_laws if accepted else laws.refuse)(problem, solver)

    check()


@by_solver
def test_a_metric_makes_no_solver_accept_what_it_refuses_without(solver):
    refused = [kind for kind in KINDS if (kind.__name__, solver.label) not in ACCEPTED]

    @settings(max_examples=2 * EXAMPLES)
    @given(st.sampled_from(refused), st.sampled_from(WEIGHTED), st.data())
    def check(kind, metric, data):
        laws.refuse(data.draw(weighted(kind, metric)), solver)

    check()


@by_pair
@by_metric
def test_answers_follow_names_and_units_where_nothing_ties(kind, metric, solver):
    @settings(max_examples=max(EXAMPLES // 3, 1))
    @given(weighted(kind, metric, generic=True))
    def check(problem):
        if solver.refusal(problem) is not None:
            laws.refuse(problem, solver)
        elif in_order(solver):
            laws.scaling_scales_the_answer(problem, solver)
        elif not isinstance(solver, AT_RANDOM):
            for law in laws.GENERIC_LAWS:
                law(problem, solver)

    check()
