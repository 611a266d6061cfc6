"""What rows of a study have in common, computed once: output metrics, and the removal curves of one budget.

A row of an ablation often differs from the one before in what is done with the same metric and the same curves, which
take half of its time. `Shared` keeps them for the next run of the same seed. A row is told the seconds that its run
would have taken alone, and no memory.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optprune import Recipe
from optprune.calibration import DenseStatistics
from optprune.calibration.dense_statistics import Removal
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.problems import LinkedLeastSquares


@dataclass
class Shared(DenseStatistics):
    """What was computed for one seed, of one model and text, and the seconds that the present run was spared."""

    seed: int | None = None
    kept: dict[tuple[Any, ...], tuple[Any, float]] = field(default_factory=dict)
    spared: float = 0.0

    def begin(self, recipe: Recipe) -> None:
        """Start a run; what another seed left is dropped."""
        if recipe.seed != self.seed:
            self.seed = recipe.seed
            self.kept.clear()
        self.spared = 0.0

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        on_group: Callable[[int, int], None],
    ) -> Metrics:
        batches = list(batches)
        key = ("metrics", sum(batch.numel() for batch in batches), seed, *full, widest)
        return self._once(key, lambda: super(Shared, self).metrics(decoder, batches, seed, full, widest, on_group))

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        key = ("removal", problem.fingerprint(), batch)
        return self._once(key, lambda: super(Shared, self).removal(problem, batch))

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """What was computed under this key, or is now."""
        if key in self.kept:
            value, seconds = self.kept[key]
            self.spared += seconds
            return value
        began = time.perf_counter()
        value = compute()
        self.kept[key] = value, time.perf_counter() - began
        return value
