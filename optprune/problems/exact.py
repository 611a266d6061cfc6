"""A layer's loss without its ridge, in float64: what every objective is measured by, whatever the dtype of a solver."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.numerics.precision import full_precision


@dataclass(frozen=True, eq=False)
class ExactLoss:
    """The original weight, the statistics of the inputs and the metric, all in float64."""

    weight: Tensor
    moments: InputMoments
    metric: OutputMetric | None

    def weigh(self, change: Tensor) -> Tensor:
        """S V."""
        return change if self.metric is None else self.metric.apply(change)

    @cached_property
    def pull(self) -> Tensor | None:
        """W A - B = W E[(x* - x) x*^T]; None when it is zero."""
        return pull_of(self.weight, self.moments)

    @cached_property
    def weighed(self) -> Tensor:
        """S W."""
        return self.weigh(self.weight)

    @cached_property
    def signal(self) -> float:
        """E|W x|^2 (in the metric)."""
        return self.squared_error(-self.weight)

    def squared_error(self, change: Tensor) -> float:
        """E|V x* - W x|^2 (in the metric) for V = W + change: E|change x* + W d|^2."""
        weighed = self.weigh(change)
        error = _product(change, self.moments.covariance, self.moments.mean, weighed)
        if self.pull is not None:
            error += 2 * float((weighed * self.pull).sum()) + self._error_at_weight
        return max(error, 0.0)

    @cached_property
    def _error_at_weight(self) -> float:
        """E|W x* - W x|^2 (in the metric)."""
        drift = self.moments.drift
        assert drift is not None
        return _product(self.weight, drift.covariance, drift.mean, self.weighed)


@full_precision()
def pull_of(weight: Tensor, moments: InputMoments) -> Tensor | None:
    """W E[d x*^T]; None when x* = x."""
    drift = moments.drift
    return None if drift is None else torch.addr(weight @ drift.cross, weight @ drift.mean, moments.mean)


def _product(left: Tensor, covariance: Tensor, mean: Tensor, weighed: Tensor) -> float:
    """tr(weighed E[z z^T] left^T), for a z of that covariance and mean."""
    return float(((left @ covariance) * weighed).sum() + (left @ mean) @ (weighed @ mean))
