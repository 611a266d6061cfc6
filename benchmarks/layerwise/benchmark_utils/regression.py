"""A layer's loss as rows of data, for libraries of linear regression."""

import numpy as np

from optprune.problems import LayerLoss
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
