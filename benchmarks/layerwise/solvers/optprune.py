"""The solvers of optprune, each with its answer after every step."""

from collections.abc import Callable
from typing import Any

from benchopt import BaseSolver
from benchopt.stopping_criterion import NoCriterion
from torch import Tensor

from optprune.errors import NoSolver
from optprune.problems import Problem
from optprune.recipe.names import read_solver
from optprune.solvers import choose, solve


class Enough(Exception):
    """benchopt needs no more points."""


class Solver(BaseSolver):
    """A solver or a chain of solvers, written as in a recipe; `chosen` is the one that optprune picks."""

    name = "optprune"
    sampling_strategy = "callback"
    # A solver stops by its own rule: one that does not improve for a few steps may still do so.
    stopping_criterion = NoCriterion(strategy="callback")
    parameters = {
        "solver": [
            "chosen",
            "magnitude",
            "wanda",
            "sparsegpt",
            "[admm, conjugate_gradients]",
            "[admm, conjugate_gradients, swaps, conjugate_gradients]",
            "[admm, conjugate_gradients, refitted_swaps]",
            "[greedy_obs, restore]",
            "[spap, restore]",
            "[fasp_metric, restore]",
            "fista",
            "proximal_admm",
        ]
    }

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the solver refuses the problem, and why."""
        try:
            solver = self._solver(problem)
        except NoSolver as error:
            return True, str(error)
        reason = solver.refusal(problem.in_output_basis()[0])
        return reason is not None, reason

    def set_objective(self, problem: Problem) -> None:
        """Take the problem."""
        self.problem, self.current = problem, problem.start

    def _solver(self, problem: Problem) -> Any:
        import yaml

        return choose(problem) if self.solver == "chosen" else read_solver(yaml.safe_load(self.solver))

    def run(self, callback: Callable[[], bool]) -> None:
        """Solve the problem, and give benchopt the answer of every step."""

        def after_step(steps: int, weight: Callable[[], Tensor]) -> None:
            self.current = weight
            if not callback():
                raise Enough

        callback()
        try:
            found = solve(self.problem, self._solver(self.problem), callback=after_step)
            self.current = lambda: found.value
            callback()
        except Enough:
            pass

    def get_result(self) -> dict[str, Tensor]:
        """Return the last answer, which is formed only where it is measured."""
        return {"weight": self.current()}
