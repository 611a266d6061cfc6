"""A layer's loss as rows of data, for libraries of linear regression."""

import numpy as np
import torch
from benchopt import BaseSolver
from torch import Tensor

from optprune.penalties import L1
from optprune.problems import LayerLoss, PenalisedLeastSquares, Problem
from optprune.problems.quadratic import Quadratic


def rows_of_data(loss: LayerLoss) -> tuple[np.ndarray, np.ndarray]:
    """Return X [samples, in] and Y [samples, out] with f(V) = 1/2 |X V^T - Y|^2 + constant, for a loss without metric.

    The ridge of the damping is more rows of data.
    """
    quadratic = Quadratic.of(loss)
    root = np.sqrt(quadratic.damping)
    inputs = np.vstack([quadratic.inputs, np.diag(root)])
    outputs = np.vstack([quadratic.outputs, root[:, None] * quadratic.weight.T])
    return np.asfortranarray(inputs), np.asfortranarray(outputs)


class LassoByRows(BaseSolver):
    """A Lasso of another library; its `run` puts the coefficients of all rows into `rows`."""

    sampling_strategy = "run_once"

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is not an l1 problem without a metric."""
        fits = isinstance(problem, PenalisedLeastSquares) and isinstance(problem.penalty, L1)
        return not fits or problem.loss.metric is not None, "it takes l1 problems without a metric"

    def set_objective(self, problem: PenalisedLeastSquares) -> None:
        """Take the data; making rows of data of the moments is not part of the run."""
        self.problem, (self.inputs, self.outputs) = problem, rows_of_data(problem.loss)
        assert isinstance(problem.penalty, L1)
        self.strength = problem.penalty.strength / len(self.inputs)

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        weight = self.problem.loss.weight
        return {"weight": torch.from_numpy(np.array(self.rows)).reshape(weight.shape).to(weight)}
