"""What a whole solve takes beside the weight and the moments, as benchmarks/workspace.py measures it."""

import pytest

from benchmarks.workspace import measured
from tests.helpers.memory import MIB, told

OUT, WIDTH = 384, 1536
MOST = {"fasp": (16, 42, 0), "structured_best": (25, 50, 30)}
"""bytes over in^2, in out and out^2: those measured, and a tenth more for what does not grow so"""


@told
@pytest.mark.parametrize("recipe", ["fasp", pytest.param("structured_best", marks=pytest.mark.slow)])
def test_a_solve_takes_no_more_than_its_formula(recipe):
    square, mixed, outputs = MOST[recipe]
    most = square * WIDTH**2 + mixed * WIDTH * OUT + outputs * OUT**2
    taken = measured(recipe, OUT, WIDTH)
    assert taken <= most, f"{taken / MIB:.0f} MiB, not {most / MIB:.0f}"
