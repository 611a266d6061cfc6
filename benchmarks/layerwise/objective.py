"""The objective of the benchmark: a layer's pruning problem, which measures every answer itself."""

from typing import Any

from benchopt import BaseObjective
from torch import Tensor

from optprune.problems import Problem


class Objective(BaseObjective):
    """The problem's objective, in (output)^2 or nats per token; infinite for an answer that is not feasible."""

    name = "Layer-wise pruning"
    min_benchopt_version = "1.10"
    requirements = ["pip::optprune"]
    sampling_strategy = "callback"
    test_config = {"dataset": {"name": "Random"}}

    def set_data(self, problem: Problem, bound: float | None = None) -> None:
        """Take a problem, and the best lower bound of its optimum that is known."""
        self.problem, self.bound = problem, bound

    def get_objective(self) -> dict[str, Any]:
        """Return what a solver gets."""
        return {"problem": self.problem}

    def get_one_result(self) -> dict[str, Tensor]:
        """Return a feasible weight."""
        return {"weight": self.problem.start()}

    def evaluate_result(self, weight: Tensor) -> dict[str, float]:
        """Return the objective of a weight, its share of the objective of the start, and the gap to the bound."""
        found = self.problem.measure(weight)
        value = found.objective if found.violation == 0 else float("inf")
        start = self.problem.objective(self.problem.start())
        gap = float("nan") if self.bound is None else (value - self.bound) / value if value else 0.0
        share = value / start if start else 1.0
        return {"value": value, "violation": found.violation, "share_of_start": share, "gap": gap}
