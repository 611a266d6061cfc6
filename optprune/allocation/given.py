"""An allocation that is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import Allocator, Division
from optprune.calibration import DenseStatistics
from optprune.metric import OutputMetric
from optprune.models import Decoder, Units
from optprune.report import Event


@final
@dataclass(frozen=True)
class Given(Allocator):
    """What every block keeps is given."""

    units: Units
    allocation: Allocation

    def check(self, decoder: Decoder) -> None:
        self.allocation.check(decoder)
        for index, block in enumerate(self.allocation.blocks):
            self.units.check(decoder, index, block)

    def divide(
        self,
        decoder: Decoder,
        batches: Sequence[Tensor],
        metrics: Mapping[str, OutputMetric],
        statistics: DenseStatistics,
        on_event: Callable[[Event], None],
    ) -> Division:
        # What a file says of its sparsity is not believed: it may have been edited.
        return Division(Allocation.of(decoder, self.allocation.blocks, self.allocation.saves))
