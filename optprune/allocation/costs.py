"""Costs: what the layers of a dense model would lose, gathered block by block for one budget over all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from optprune.allocation.allocation import Allocation
from optprune.calibration import DenseStatistics, Probe
from optprune.models import Decoder, Target
from optprune.problems import LayerLoss
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET

NOISE_FLOOR_NATS = 1e-5
"""the smallest divergence, in nats a token, that float32 arithmetic tells from none"""


class Costs(ABC):
    """What was gathered so far. Costs must be in one unit, which losses are under an output metric only."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to tell of how they were measured; strict mode makes it an error."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell of the allocation, once there is one."""
        return ()

    @abstractmethod
    def add(self, block: int, target: Target, loss: LayerLoss) -> None:
        """Gather what a layer would lose."""

    @abstractmethod
    def close(self) -> None:
        """All layers of a block are added: try out together what a probe can tell together only."""

    @abstractmethod
    def allocation(self, on_event: Callable[[Event], None], begins: float = 0.0) -> Allocation:
        """What every block keeps, once all blocks are closed, and the probe is at the end: it puts the costs right.

        `begins` is the share of the budget's work that was done before.
        """

    @staticmethod
    def divergences(probe: Probe, on_event: Callable[[Event], None], begins: float) -> list[float]:
        """What all that a probe has tried does to the predictions; it is told how far that is."""

        def measured(done: int, total: int) -> None:
            on_event(PhaseAdvanced(BUDGET, "measuring what changes do to predictions", "change", done, total, begins))

        return probe.divergences(measured)


class CostBudget(ABC):
    """A budget over the whole model that costs divide."""

    @abstractmethod
    def check(self, decoder: Decoder) -> None:
        """Raise InputError when no costs can divide it over a model of these shapes."""

    @abstractmethod
    def changes(self, targets: Sequence[Target]) -> int:
        """How many changes a probe tries of a block with these layers, each alone."""

    @abstractmethod
    def costs(self, decoder: Decoder, statistics: DenseStatistics, probe: Probe | None, in_nats: bool) -> Costs:
        """An empty collection. A `probe` puts costs right; `in_nats` says that losses are already in its unit."""


def rate_of(measured: float, predicted: float, in_nats: bool) -> float:
    """A divergence over what the losses predict, which is in the same unit under an output metric only."""
    if in_nats:
        return (measured + NOISE_FLOOR_NATS) / (predicted + NOISE_FLOOR_NATS)
    return (measured + NOISE_FLOOR_NATS) / predicted if predicted > 0 else 1.0
