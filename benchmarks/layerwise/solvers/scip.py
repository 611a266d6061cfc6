"""cvxpy with SCIP: the proved optimum of a choice among about a dozen weights or channels."""

from benchopt import BaseSolver
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import Problem, SelectionProblem, to_cvxpy

MOST = 16
"""the most weights or units of a problem that is given to SCIP"""


class Solver(BaseSolver):
    """SCIP, on the mixed-integer program of the problem."""

    name = "SCIP"
    sampling_strategy = "run_once"
    requirements = ["pip::cvxpy", "pip::pyscipopt"]

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem chooses nothing, or among too many."""
        if not isinstance(problem, SelectionProblem):
            return True, f"SCIP is not for a {problem.kind} problem"
        try:
            choice = to_cvxpy(problem).choice
        except InputError as error:
            return True, str(error)
        assert choice is not None
        return choice.size > MOST, f"{choice.size} binary variables take SCIP too long"

    def set_objective(self, problem: Problem) -> None:
        """State the program."""
        self.model = to_cvxpy(problem)

    def run(self, _: object) -> None:
        """Solve the program."""
        self.model.program.solve(solver="SCIP", scip_params={"limits/time": 600})

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        return {"weight": self.model.value()}
