"""The Lasso of skglm, row by row."""

import numpy as np
import torch
from benchmark_utils.regression import rows_of_data
from benchopt import BaseSolver
from skglm import Lasso
from torch import Tensor

from optprune.penalties import L1
from optprune.problems import PenalisedLeastSquares, Problem


class Solver(BaseSolver):
    """Working sets with Anderson acceleration (arXiv 2204.07826), with its own settings."""

    name = "skglm"
    sampling_strategy = "run_once"
    requirements = ["pip::skglm"]

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is not an l1 problem without a metric."""
        fits = isinstance(problem, PenalisedLeastSquares) and isinstance(problem.penalty, L1)
        return not fits or problem.loss.metric is not None, "it takes l1 problems without a metric"

    def set_objective(self, problem: PenalisedLeastSquares) -> None:
        """Take the data; making rows of data of the moments is not part of the run."""
        self.problem, (self.inputs, self.outputs) = problem, rows_of_data(problem.loss)
        assert isinstance(problem.penalty, L1)
        self.model = Lasso(problem.penalty.strength / len(self.inputs), fit_intercept=False)

    def warm_up(self) -> None:
        """Compile, which is not timed."""
        self.model.fit(self.inputs, self.outputs[:, 0])

    def run(self, _: object) -> None:
        """Fit every row."""
        self.rows = np.stack([self.model.fit(self.inputs, row).coef_ for row in self.outputs.T])

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        return {"weight": torch.from_numpy(self.rows).to(self.problem.loss.weight)}
