"""Solvers of cvxpy, on the program of a problem."""

from typing import Any

from benchopt import BaseSolver
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import CvxpyModel, Problem, to_cvxpy


class ByCvxpy(BaseSolver):
    """A solver of cvxpy; its compilation of the program is part of the run."""

    sampling_strategy = "run_once"
    kinds: tuple[type[Problem], ...]
    """the kinds of problems that it is for"""
    solver: str
    """its name in cvxpy"""
    settings: dict[str, Any] = {}

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is of another kind, or too large."""
        if not isinstance(problem, self.kinds):
            return True, f"{self.name} is not for a {problem.kind} problem"
        try:
            reason = self.too_large(to_cvxpy(problem))
        except InputError as error:
            reason = str(error)
        return reason is not None, reason

    def too_large(self, model: CvxpyModel) -> str | None:
        """Return why a program takes the solver too long, or None."""
        return None

    def set_objective(self, problem: Problem) -> None:
        """State the program."""
        self.model = to_cvxpy(problem)

    def run(self, _: object) -> None:
        """Solve the program."""
        self.model.program.solve(solver=self.solver, **self.settings)

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        return {"weight": self.model.value()}
