"""The allocation of a model that stays dense."""

from dataclasses import dataclass
from typing import final

from optprune.allocation.allocation import everything
from optprune.allocation.base import Allocator, DenseModel, Division
from optprune.models import Decoder

NOTHING = "the sparsity is 0: nothing is removed, and no layer is solved"


@final
@dataclass(frozen=True)
class Dense(Allocator):
    """Every block keeps all that it has."""

    def check(self, decoder: Decoder) -> None:
        pass

    def divide(self, dense: DenseModel) -> Division:
        return Division(everything(dense.decoder), notes=(NOTHING,))
