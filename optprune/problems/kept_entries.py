"""The entries of a parameter that may move while others are gone for good."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, " kept"]


@final
@dataclass(frozen=True, eq=False)
class KeptEntries:
    """Entries of a parameter, which is read and written through them: of a matrix what is not zero, of a vector all."""

    weight: Tensor
    """the parameter itself, apart from autograd"""
    places: Int[Tensor, " kept"] | None
    """where they are in it, row by row; None where they are all of it"""

    @classmethod
    def of(cls, parameter: Tensor) -> "KeptEntries":
        """Those of a parameter as it is now."""
        weight = parameter.detach()
        if weight.ndim < 2 or bool(weight.all()):
            return cls(weight, None)
        places = weight.reshape(-1).nonzero().squeeze(1)
        return cls(weight, places.int() if weight.numel() <= torch.iinfo(torch.int32).max else places)

    @property
    def count(self) -> int:
        return self.weight.numel() if self.places is None else len(self.places)

    def picked(self, tensor: Tensor) -> Values:
        """The same entries of a tensor of the parameter's shape; the tensor's own memory where they are all."""
        flat = tensor.reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def read(self, into: Values | None = None) -> Values:
        """What the parameter has there, copied."""
        if into is not None:
            return into.copy_(self.picked(self.weight))
        found = self.picked(self.weight)
        return found.clone() if self.places is None else found

    def write(self, values: Values) -> None:
        """Let the parameter have these values there."""
        flat = self.weight.reshape(-1)
        if self.places is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, self.places.long(), values)
        if flat.data_ptr() != self.weight.data_ptr():  # what is not contiguous was copied to be flat
            self.weight.copy_(flat.view_as(self.weight))

    def others(self) -> int:
        """How many entries beside these are not zero."""
        return int(self.weight.count_nonzero()) - int(self.read().count_nonzero())
