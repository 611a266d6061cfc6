"""The Lasso of scikit-learn, row by row."""

import torch
from benchmark_utils.regression import rows_of_data
from benchopt import BaseSolver
from sklearn.linear_model import Lasso
from torch import Tensor

from optprune.penalties import L1
from optprune.problems import PenalisedLeastSquares, Problem


class Solver(BaseSolver):
    """Coordinate descent with its own settings (a duality gap of 1e-4 of |y|^2, at most 1000 passes)."""

    name = "scikit-learn"
    sampling_strategy = "run_once"
    requirements = ["pip::scikit-learn"]

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is not an l1 problem without a metric."""
        fits = isinstance(problem, PenalisedLeastSquares) and isinstance(problem.penalty, L1)
        return not fits or problem.loss.metric is not None, "it takes l1 problems without a metric"

    def set_objective(self, problem: PenalisedLeastSquares) -> None:
        """Take the data; making rows of data of the moments is not part of the run."""
        self.problem, (self.inputs, self.outputs) = problem, rows_of_data(problem.loss)
        assert isinstance(problem.penalty, L1)
        self.strength = problem.penalty.strength / len(self.inputs)

    def run(self, _: object) -> None:
        """Fit every row."""
        model = Lasso(self.strength, fit_intercept=False, precompute=True)
        self.rows = model.fit(self.inputs, self.outputs).coef_

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        weight = self.problem.loss.weight
        return {"weight": torch.from_numpy(self.rows.copy()).reshape(weight.shape).to(weight)}
