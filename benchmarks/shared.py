"""What rows of a study have in common, computed once: output metrics, and the error curves of one budget.

A row of an ablation often differs from the one before in what is done with the same metric and the same curves, which
take half of its time. Inside `shared` they are kept for the next run of the same seed. A row is told the seconds that
its run would have taken alone, and no memory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from optprune import Recipe, by_cost, pipeline

OF_CURVES = (
    *("output_metric", "metric_damping", "metric_tokens", "units", "width_multiple", "held_out", "damping"),
    "fit_bias",
)
"""the recipe's fields that a curve without probes depends on, next to the inputs"""


@dataclass
class Shared:
    """What was computed for one seed, and the seconds that the present run was spared."""

    seed: int | None = None
    kept: dict[tuple[Any, ...], tuple[Any, float]] = field(default_factory=dict)
    spared: float = 0.0

    def begin(self, recipe: Recipe) -> None:
        """Start a run; what another seed left is dropped."""
        if recipe.seed != self.seed:
            self.seed = recipe.seed
            self.kept.clear()
        self.spared = 0.0

    def once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """What was computed under this key, or is now."""
        if key in self.kept:
            value, seconds = self.kept[key]
            self.spared += seconds
            return value
        began = time.perf_counter()
        value = compute()
        self.kept[key] = value, time.perf_counter() - began
        return value


@contextmanager
def shared() -> Iterator[Shared]:
    """Let the runs of one model on one calibration text share what they can; say `begin` before each."""
    memory = Shared()
    collect, curve = pipeline.collect_metrics, by_cost._width_curve

    def metrics(decoder: Any, batches: Any, label: Any, **options: Any) -> Any:
        key = ("metrics", sum(batch.numel() for batch in batches), *sorted(options.items()))
        return memory.once(key, lambda: collect(decoder, batches, label, **options))

    def curves(decoder: Any, recipe: Recipe, index: int, path: str, loss: Any, probe: Any) -> Any:
        if probe is not None:
            return curve(decoder, recipe, index, path, loss, probe)
        key = ("curve", index, path, *(getattr(recipe, name) for name in OF_CURVES))
        return memory.once(key, lambda: curve(decoder, recipe, index, path, loss, probe))

    with patch.object(pipeline, "collect_metrics", metrics), patch.object(by_cost, "_width_curve", curves):
        yield memory
