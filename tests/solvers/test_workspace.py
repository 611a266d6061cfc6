"""What a whole solve takes beside the weight and the moments, as benchmarks/workspace.py measures it."""

import pytest

from benchmarks.workspace import measured
from optprune.recipe import load_recipe
from optprune.solvers import Admm, Chain, ConjugateGradients, GreedyObs, Restore, SparseGpt, Wanda
from tests.helpers.memory import MIB, told

OUT, WIDTH = 384, 1536
BEYOND = 1.15
"""what does not grow as the formula says, such as the first use of a library's functions"""


@told
@pytest.mark.parametrize("recipe", ["fasp", pytest.param("structured_best", marks=pytest.mark.slow)])
def test_a_solve_takes_what_its_solver_says(recipe):
    chosen = load_recipe(recipe)
    stated = chosen.solver.takes(OUT, WIDTH, chosen.metric is not None)
    taken = measured(recipe, OUT, WIDTH)
    assert stated / 1.3 <= taken <= BEYOND * stated, f"{taken / MIB:.0f} MiB, stated {stated / MIB:.0f} MiB"


def test_a_chain_takes_what_its_most_costly_stage_does():
    stages = (Wanda(), SparseGpt(), Restore())
    for out, width in ((64, 4096), (4096, 64)):
        each = [stage.takes(out, width, False) for stage in stages]
        assert Chain(stages).takes(out, width, False) == max(each)
    assert Chain((Admm(), ConjugateGradients())).keeps == Admm().keeps > 0 == Chain((GreedyObs(), Restore())).keeps


def test_a_coupling_metric_adds_what_goes_with_the_outputs():
    for solver in (Admm(), GreedyObs(), Restore()):
        assert solver.takes(4096, 64, True) > 3 * solver.takes(4096, 64, False)
