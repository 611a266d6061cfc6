"""References: the optimum of small problems from the mathematics, by numpy, scipy and cvxpy, using no solver of ours.

A reference reads a problem's data and nothing else: quadratic.py rebuilds the loss from the moments. It needs scipy and
cvxpy, with SCIP for `mixed_integer` (`pip install optprune[testing]`); without them the import fails, because a check
that skips proves nothing.
"""

from collections.abc import Callable
from functools import lru_cache

from optprune.problems import (
    LinkedLeastSquares,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.testing.choice_references import exhaustive, exhaustive_entries
from optprune.testing.convex_references import Reference, least_squares, penalised

REFERENCES: dict[type[Problem], Callable[..., Reference]] = {
    MaskedLeastSquares: least_squares,
    LinkedLeastSquares: exhaustive,
    PenalisedLeastSquares: penalised,
    SparseLeastSquares: exhaustive_entries,
    StructuredLeastSquares: exhaustive,
}
"""for each concrete kind of problem a function that finds its optimum"""


@lru_cache(maxsize=64)
def reference(problem: Problem) -> Reference:
    """The optimum of a small problem, found without any solver of optprune, and how much of it is rounding.

    Remembered for the problem object, because every law asks for it again.
    """
    if type(problem) not in REFERENCES:
        raise TypeError(f"no reference for {type(problem).__name__}: add one to optprune.testing.references.REFERENCES")
    return REFERENCES[type(problem)](problem)


def reference_optimum(problem: Problem) -> float:
    """The optimal objective of a small problem, found without any solver of optprune."""
    return reference(problem).optimum
