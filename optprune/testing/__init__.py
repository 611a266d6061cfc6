"""Checks of solvers and penalties, for third parties too: laws, strategies and independent references.

Needs the extra `testing` (hypothesis, cvxpy); a missing one is an ImportError, never a skipped check.
"""

from optprune.testing.check import check_penalty, check_solver
from optprune.testing.laws import SOLVER_LAWS, keep_laws
from optprune.testing.references import REFERENCES, Reference, convex_optimum, reference, reference_optimum
from optprune.testing.strategies import STRATEGIES

__all__ = [
    "REFERENCES",
    "SOLVER_LAWS",
    "STRATEGIES",
    "Reference",
    "check_penalty",
    "check_solver",
    "convex_optimum",
    "keep_laws",
    "reference",
    "reference_optimum",
]
