"""Allocators: each divides a budget over the blocks of a model in its own way, and says beforehand whether it can."""

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


@dataclass(frozen=True, eq=False)
class DenseModel:
    """The model before anything is removed, and what may be asked of it to divide a budget over its blocks."""

    decoder: Decoder
    batches: Sequence[Tensor]
    """the calibration tokens"""
    metrics: Mapping[str, OutputMetric] = field(default_factory=dict)
    """what weighs the outputs of a layer, by its full name; those of a layer without one count alike"""
    statistics: DenseStatistics = field(default_factory=DenseStatistics)
    on_event: Callable[[Event], None] = lambda event: None
    partial_sums: PartialSums = field(default_factory=PartialSums)
    """how passes over all batches divide them"""


@dataclass(frozen=True)
class Division:
    """What an allocator came to."""

    allocation: Allocation
    removed: tuple[RemovedPart, ...] = ()
    """the sub-blocks that a score chose"""
    warnings: tuple[str, ...] = ()
    """the sentences that strict mode makes errors"""
    notes: tuple[str, ...] = ()


class Allocator(ABC):
    """A way to say what every block keeps."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to tell of any division of this kind; strict mode makes it an error."""
        return ()

    @property
    def probes(self) -> bool:
        """Whether the model itself is tried with less: half precision is too coarse for that, and float32 is used."""
        return False

    @abstractmethod
    def check(self, decoder: Decoder) -> None:
        """Raise InputError when a model of these shapes cannot be divided so; it may be on the meta device."""

    @abstractmethod
    def divide(self, dense: DenseModel) -> Division:
        """Say what every block keeps. The model is left as it was."""


class MeasuredBudget(Allocator):
    """Divides one budget by what removing would cost the dense model, as far as that is known block by block.

    A probe may put the costs right: it removes something of each block alone and goes on to the predictions.
    """

    units: Units
    """what is removed"""
    probe_tokens: int
    """about how many tokens a probe tries changes on; 0 where there is none"""

    @property
    def probes(self) -> bool:
        return self.probe_tokens > 0

    @abstractmethod
    def changes(self, targets: Sequence[Target]) -> int:
        """How many changes a probe tries of a block with these layers, each alone."""

    @abstractmethod
    def work(self, decoder: Decoder, tokens: int) -> float:
        """The work by so many tokens, in multiplications as a product of matrices counts them: a guess, to go by."""

    @abstractmethod
    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        """Divide by what is met along a stream, which holds the inputs of the first block and goes on to the end.

        Without one, the batches are gone through, as far as what is asked of them is not known.
        """

    def divide(self, dense: DenseModel) -> Division:
        probe = Probe(dense.decoder, first_tokens(dense.batches, self.probe_tokens)) if self.probes else None
        return self.along(dense, None, probe)
