"""cvxpy with Clarabel, an interior-point method: for the convex problems, and small ones only."""

from benchopt import BaseSolver
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import MaskedLeastSquares, PenalisedLeastSquares, Problem, to_cvxpy


class Solver(BaseSolver):
    """Clarabel, on the cvxpy program of the problem."""

    name = "Clarabel"
    sampling_strategy = "run_once"
    requirements = ["pip::cvxpy"]
    solver = "CLARABEL"
    kinds: tuple[type[Problem], ...] = (MaskedLeastSquares, PenalisedLeastSquares)

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is not convex, or too large."""
        if not isinstance(problem, self.kinds):
            return True, f"{self.name} is not for a {problem.kind} problem"
        try:
            to_cvxpy(problem)
        except InputError as error:
            return True, str(error)
        return False, None

    def set_objective(self, problem: Problem) -> None:
        """State the program; its compilation is part of the run."""
        self.model = to_cvxpy(problem)

    def run(self, _: object) -> None:
        """Solve the program."""
        self.model.program.solve(solver=self.solver)

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer, or the start where there is none."""
        return {"weight": self.model.value()}
