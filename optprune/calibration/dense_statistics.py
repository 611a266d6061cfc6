"""What is measured of the dense model before anything is removed, and may be measured once for several recipes."""

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from optprune.calibration.fisher_pass import collect_metrics, positions_before, sampled
from optprune.calibration.lanes import Lanes
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.problems import LinkedLeastSquares
from optprune.solvers import removal_curve

Removal = tuple[Tensor, Tensor, tuple[str, ...]]
"""a removal curve: the order in which units go, the loss after each, and notes"""


class DenseStatistics:
    """Output metrics and removal curves, measured whenever they are asked for."""

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        on_pass: Callable[[int, int], None],
        lanes: Lanes | None = None,
    ) -> Metrics:
        """The output metrics of a model, not damped, with labels drawn by a seed: see `collect_metrics`."""
        batches, lanes = list(batches), lanes or Lanes()
        labels = sampled(seed, positions_before(batches, lanes))
        return collect_metrics(decoder, batches, labels, full=full, widest=widest, on_pass=on_pass, lanes=lanes)

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        """The removal curve of a layer's units: see `removal_curve`."""
        return removal_curve(problem, batch=batch)


class Statistics(DenseStatistics):
    """Dense statistics measured once and kept: `prune` need not measure again what several recipes have in common.

    What was measured goes by its content: the model's weights, the tokens, the seed, the layer's problem. So one
    object may serve copies of a model, other texts and other models, and a model that is changed is measured anew.
    Everything is kept, in memory and where it was measured, until `forget`.
    """

    def __init__(self) -> None:
        self.spared = 0.0
        """the seconds of measuring that were saved"""
        self._kept: dict[tuple[Any, ...], tuple[Any, float]] = {}

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        on_pass: Callable[[int, int], None],
        lanes: Lanes | None = None,
    ) -> Metrics:
        batches, model = list(batches), decoder.model
        content = fingerprint((model.config.to_json_string(), list(model.parameters()), batches))
        lanes = lanes or Lanes()
        key = ("metrics", content, model.device, seed, *sorted(full), widest, lanes.count)
        measure = super().metrics
        kept = self._once(key, lambda: measure(decoder, batches, seed, full, widest, on_pass, lanes))
        # A view: a run forgets layer by layer what it needs no longer.
        return kept.damped(0.0)

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        key = ("removal", problem.fingerprint(), problem.loss.weight.device, batch)
        return self._once(key, lambda: super(Statistics, self).removal(problem, batch))

    def forget(self) -> None:
        """Free all that is kept."""
        self._kept.clear()

    def _once(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        """What was measured under this key, or is now."""
        if key in self._kept:
            value, seconds = self._kept[key]
            self.spared += seconds
            return value
        began = time.perf_counter()
        value = measure()
        self._kept[key] = value, time.perf_counter() - began
        return value
