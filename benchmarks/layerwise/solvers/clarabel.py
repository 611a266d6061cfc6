"""cvxpy with Clarabel, an interior-point method: for the convex problems, and small ones only."""

from benchmark_utils.programs import ByCvxpy

from optprune.problems import MaskedLeastSquares, PenalisedLeastSquares


class Solver(ByCvxpy):
    """Clarabel, on the cvxpy program of the problem."""

    name = "Clarabel"
    requirements = ["pip::cvxpy"]
    solver = "CLARABEL"
    kinds = (MaskedLeastSquares, PenalisedLeastSquares)
