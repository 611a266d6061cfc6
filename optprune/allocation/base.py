"""Allocators: each divides a budget over the blocks of a model, checks beforehand that it can, and states its work."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from optprune.allocation.allocation import Allocation
from optprune.calibration import DenseStatistics, Probe, Stream, first_tokens
from optprune.calibration.partial_sums import PartialSums
from optprune.metric import OutputMetric
from optprune.models import Decoder, Target, Units
from optprune.report import Event, RemovedPart
from optprune.work import Work


@dataclass(frozen=True, eq=False)
class DenseModel:
    """The dense model with the calibration tokens and their statistics, from which an allocator divides a budget."""

    decoder: Decoder
    batches: Sequence[Tensor]
    """the calibration tokens"""
    metrics: Mapping[str, OutputMetric] = field(default_factory=dict)
    """the output metric of a layer by its full name; the outputs of a layer without one count alike"""
    statistics: DenseStatistics = field(default_factory=DenseStatistics)
    on_event: Callable[[Event], None] = lambda event: None
    partial_sums: PartialSums = field(default_factory=PartialSums)
    """the division of the batches in passes over all of them"""


@dataclass(frozen=True)
class Division:
    """Result of an allocator."""

    allocation: Allocation
    removed: tuple[RemovedPart, ...] = ()
    """the sub-blocks that are removed by their score"""
    warnings: tuple[str, ...] = ()
    """sentences that are errors in strict mode"""
    notes: tuple[str, ...] = ()


class Allocator(ABC):
    """Rule by which every block's allocation is chosen."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about every division of this kind, which are errors in strict mode."""
        return ()

    @property
    def probes(self) -> bool:
        """Whether the allocator tries changes of the model, which needs float32."""
        return False

    @abstractmethod
    def check(self, decoder: Decoder) -> None:
        """Raise InputError where a model of these shapes, which may be on the meta device, cannot be divided so."""

    @abstractmethod
    def divide(self, dense: DenseModel) -> Division:
        """Return the allocation of every block. The model does not change."""

    @abstractmethod
    def work(self, shapes: Decoder, tokens: int) -> Work:
        """Return the work of `divide` on so many calibration tokens; `shapes` may be on the meta device."""

    def step(self, shapes: Decoder) -> float:
        """Return the number of linear weights by which a division may miss the budget, because units go whole."""
        return 1.0

    def head_tokens(self, shapes: Decoder, tokens: int) -> int:
        """Return the number of tokens that `divide` sends through the head, beside that work."""
        return 0


class MeasuredBudget(Allocator):
    """Allocator of one budget by the costs of removal, measured block by block in the dense model.

    A probe may rescale the costs: it removes units of each block alone and measures the divergence of the predictions.
    """

    units: Units
    """the units that are removed"""
    probe_tokens: int
    """the approximate number of tokens of the probe; 0 for no probe"""

    @property
    def probes(self) -> bool:
        return self.probe_tokens > 0

    @abstractmethod
    def changes(self, targets: Sequence[Target]) -> int:
        """Return the number of changes that a probe tries of a block with these layers."""

    @abstractmethod
    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        """Divide the budget by costs measured along a stream, which holds the inputs of the first block.

        Without a stream, the batches are run as far as their statistics are not cached.
        """

    def divide(self, dense: DenseModel) -> Division:
        probe = Probe(dense.decoder, first_tokens(dense.batches, self.probe_tokens)) if self.probes else None
        return self.along(dense, None, probe)
