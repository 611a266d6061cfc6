"""The entries of a parameter that may move while others are gone for good."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, " room"]
Places = Int[Tensor, " some"]
FEW = 1 / 6
"""the share of zeros up to which room for them, in four vectors, takes less memory than to say where the others are"""


@final
@dataclass(frozen=True, eq=False)
class KeptEntries:
    """Entries of a parameter, which is read and written through them: of a matrix what is not zero, of a vector all.

    They are in a vector, row by row, which where few of the parameter's are gone has zeros in place of those.
    """

    weight: Tensor
    """the parameter itself, apart from autograd"""
    places: Places | None = None
    """where they are in it; None where the vector has room for all of it"""
    gone: Places | None = None
    """the zeros in such a vector, if any"""

    @classmethod
    def of(cls, parameter: Tensor) -> "KeptEntries":
        """Those of a parameter as it is now."""
        weight = parameter.detach()
        zeros = weight.numel() - int(weight.count_nonzero())
        if weight.ndim < 2 or not zeros:
            return cls(weight)
        small = weight.numel() <= torch.iinfo(torch.int32).max
        few = zeros <= FEW * weight.numel()
        found = ((weight == 0) if few else (weight != 0)).reshape(-1).nonzero().squeeze(1)
        found = found.int() if small else found
        return cls(weight, gone=found) if few else cls(weight, places=found)

    @property
    def count(self) -> int:
        """How many they are."""
        return self.room - (0 if self.gone is None else len(self.gone))

    @property
    def room(self) -> int:
        """How long their vector is."""
        return self.weight.numel() if self.places is None else len(self.places)

    def zeros(self) -> Values:
        """A vector for them."""
        return self.weight.new_zeros(self.room)

    def taken(self, tensor: Tensor) -> Values:
        """The same entries of a tensor of the parameter's shape, in its memory where there is room for all of it.

        Not yet `cleared`: the memory of a gradient may be that of others too.
        """
        flat = tensor.reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def cleared(self, values: Values) -> Values:
        """A vector with zeros in place of what is gone, put there."""
        return values if self.gone is None else values.index_fill_(0, self.gone.long(), 0.0)

    def read(self, into: Values | None = None) -> Values:
        """What the parameter has there, copied."""
        found = self.taken(self.weight)
        if into is not None:
            return into.copy_(found)
        return found.clone() if self.places is None else found

    def write(self, values: Values) -> None:
        """Let the parameter have these values there."""
        flat = self.weight.reshape(-1)
        if self.places is None:
            self.cleared(flat.copy_(values))
        else:
            flat.index_copy_(0, self.places.long(), values)
        if flat.data_ptr() != self.weight.data_ptr():  # what is not contiguous was copied to be flat
            self.weight.copy_(flat.view_as(self.weight))

    def others(self) -> int:
        """How many entries of the parameter beside these are not zero."""
        if self.places is None:
            return 0 if self.gone is None else int(self.weight.reshape(-1)[self.gone.long()].count_nonzero())
        return int(self.weight.count_nonzero()) - int(self.read().count_nonzero())
