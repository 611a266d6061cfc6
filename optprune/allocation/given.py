"""An allocation that is given."""

from dataclasses import dataclass
from typing import final

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import Allocator, DenseModel, Division
from optprune.models import Decoder, Units


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

    def divide(self, dense: DenseModel) -> Division:
        # What a file says of its sparsity is not believed: it may have been edited.
        return Division(Allocation.of(dense.decoder, self.allocation.blocks, self.allocation.saves))
