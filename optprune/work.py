"""The cost of a piece of a run, declared beside the code that does it and summed by the plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Arithmetic, memory and passes of tokens. Sums add the arithmetic and the passes, and take the largest memory."""

    flops: float = 0.0
    """floating-point operations, two for each multiplication, counted at the speed of a large matrix product: an
    operation that runs slower counts for more"""
    bytes: float = 0.0
    """peak memory in bytes, beside the inputs that the caller holds"""
    passes: float = 0.0
    """passes of the calibration tokens through the block, in forward passes; a backward pass counts for two"""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, max(self.bytes, other.bytes), self.passes + other.passes)

    def __mul__(self, times: float) -> "Work":
        """Return the work of doing the same thing several times, one after the other."""
        return Work(self.flops * times, self.bytes, self.passes * times)
