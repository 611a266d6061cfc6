"""cvxpy with SCIP: the proved optimum of a choice among about a dozen weights or channels."""

from benchmark_utils.programs import ByCvxpy

from optprune.problems import CvxpyModel, SelectionProblem

MOST = 16
"""the most weights or units of a problem that is given to SCIP"""


class Solver(ByCvxpy):
    """SCIP, on the mixed-integer program of the problem."""

    name = "SCIP"
    requirements = ["pip::cvxpy", "pip::pyscipopt"]
    solver = "SCIP"
    kinds = (SelectionProblem,)
    settings = {"scip_params": {"limits/time": 600}}

    def too_large(self, model: CvxpyModel) -> str | None:
        """Return why a choice among more than `MOST` is skipped."""
        assert model.choice is not None
        many = model.choice.size > MOST
        return f"{model.choice.size} binary variables take SCIP too long" if many else None
