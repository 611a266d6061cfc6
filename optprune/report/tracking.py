"""Events of a run as numbers for an experiment tracker."""

import math
from typing import Protocol

from optprune.report.events import BlockFinished, DivergenceMeasured, Event, LayerSolved, PhaseFinished


class Log(Protocol):
    """Function that stores numbers by name: `log` of accelerate's trackers and of W&B, `mlflow.log_metrics`."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> object: ...


class TrackedEvents:
    """Receiver of the events of `prune` or `heal` that passes their numbers to an experiment tracker.

    Pass it as `on_event`. Numbers are named by groups: `layer/relative_error`, `block/seconds`, `pruning/host_bytes`,
    `healing/divergence`. The step is the number of layers solved so far plus the training steps of healing, so that it
    never falls. Values that are not finite are left out.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._layers, self._trained = log, 0, 0

    def __call__(self, event: Event) -> None:
        """Pass the numbers of an event, if it has any."""
        values: dict[str, float | None] = {}
        if isinstance(event, LayerSolved):
            self._layers += 1
            layer = event.layer
            names = ("relative_error", "held_out_error", "objective", "gap", "damping", "seconds")
            values = {f"layer/{name}": getattr(layer, name) for name in names}
        elif isinstance(event, BlockFinished):
            values = {"block/number": event.block, "block/seconds": event.seconds}
        elif isinstance(event, PhaseFinished):
            phase = event.phase
            names = ("seconds", "host_bytes", "device_bytes")
            values = {f"{phase.name}/{name}": getattr(phase, name) for name in names}
        elif isinstance(event, DivergenceMeasured):
            self._trained = max(self._trained, event.step)
            values = {"healing/divergence": event.divergence, "healing/perplexity": event.perplexity}
        found = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if found:
            self._log(found, step=self._layers + self._trained)
