"""What is measured of the dense model before anything is removed, and may be measured once for several recipes."""

from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from optprune.calibration.fisher_pass import collect_metrics, sampled
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.problems import LinkedLeastSquares
from optprune.solvers import removal_curve

Removal = tuple[Tensor, Tensor, tuple[str, ...]]
"""the order in which units go, the loss after each, and notes"""


class DenseStatistics:
    """Output metrics and removal curves, measured whenever they are asked for.

    A class of one's own that keeps them, given to `prune` again for another recipe on the same text and a copy of the
    same model, saves what the recipes share.
    """

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        on_group: Callable[[int, int], None],
    ) -> Metrics:
        """The output metrics of a model, not damped, with labels drawn by a seed: see `collect_metrics`."""
        return collect_metrics(decoder, batches, sampled(seed), full=full, widest=widest, on_group=on_group)

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        """The removal curve of a layer's units: see `removal_curve`."""
        return removal_curve(problem, batch=batch)
