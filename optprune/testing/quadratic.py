"""The exact objective of a problem in extended precision, and the rounding of its loss."""

import numpy as np
from torch import Tensor

from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import LayerLoss, PenalisedLeastSquares, Problem
from optprune.problems.quadratic import Array, Quadratic, array


def rounding(loss: LayerLoss, weight: Tensor) -> float:
    """Return the part of the loss of a weight [out, in] that may be rounding of the moments and of sums over them."""
    return Quadratic.of(loss).rounding(array(weight))


def clearly_regular(loss: LayerLoss) -> bool:
    """Return whether the least eigenvalue of A, in units of its inputs, is well above the rounding of its dtype."""
    quadratic = Quadratic.of(loss)
    unit = np.outer(quadratic.scale, quadratic.scale)
    values = np.linalg.eigvalsh(quadratic.gram / unit)
    # The rounding of every entry of a row.
    spread = float(np.abs(quadratic.uncentred / unit).sum(1).max())
    return bool(values[0] > 4 * len(values) * quadratic.epsilon * spread)


Long = np.longdouble


def exact_objective(problem: Problem, weight: Tensor | Array) -> Long:
    """Return the objective of a weight [out, in] in numpy's extended precision, of 64 binary digits."""
    value = _long(weight)
    loss = _loss(problem.loss, value)
    return loss + _penalty(problem.penalty, value) if isinstance(problem, PenalisedLeastSquares) else loss


def _loss(loss: LayerLoss, weight: Array) -> Long:
    """Return 1/2 E|(V - W) x* + W (x* - x)|^2 in the metric, at least zero, plus the ridge."""
    moments, old = loss.moments.centred() if loss.fit_bias else loss.moments, _long(loss.weight)
    change, metric = weight - old, _long_metric(loss)
    error = _weighed(metric, change, _square(_long(moments.covariance), _long(moments.mean)), change)
    drift = moments.drift
    if drift is not None:
        mean = _long(drift.mean)
        lag = _long(drift.cross) + np.outer(mean, _long(moments.mean))
        error += 2 * _weighed(metric, change, lag.T, old)
        error += _weighed(metric, old, _square(_long(drift.covariance), mean), old)
    ridge = _weighed(metric, change, np.diag(_long(loss.damping)), change)
    return (max(error, Long(0)) + ridge) / 2


def _square(covariance: Array, mean: Array) -> Array:
    """Return the symmetric part of E[z z^T], on which alone a quadratic form depends."""
    return (covariance + covariance.T) / 2 + np.outer(mean, mean)


def _weighed(metric: Array, left: Array, matrix: Array, right: Array) -> Long:
    """Return tr(S L M R^T)."""
    return np.sum((metric @ (left @ matrix)) * right)


def _long_metric(loss: LayerLoss) -> Array:
    if loss.metric is None:
        return np.eye(loss.weight.shape[0], dtype=Long)
    average = _long(loss.metric.average)
    matrix = (average + average.T) / 2 if average.ndim == 2 else np.diag(average)
    return matrix + np.diag(_long(loss.metric.damping))


def _penalty(penalty: Penalty, weight: Array) -> Long:
    """Return P(V), by the formula."""
    match penalty:
        case L1(strength):
            return Long(strength) * np.abs(weight).sum()
        case WeightedL1(weights):
            return (_long(weights) * np.abs(weight)).sum()
        case ElasticNet(strength, ridge):
            return Long(strength) * np.abs(weight).sum() + Long(ridge) / 2 * np.square(weight).sum()
        case ColumnGroups(strength):
            return Long(strength) * np.sqrt(np.square(weight).sum(0)).sum()
    raise TypeError(f"no exact value for the penalty {type(penalty).__name__}: add it to {__name__}")


def _long(values: Tensor | Array) -> Array:
    return (values if isinstance(values, np.ndarray) else array(values)).astype(Long)
