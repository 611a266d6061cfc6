"""The cost of a piece of a run, declared beside the code that does it and summed by the plan.

The functions give the flops of the matrix routines that such declarations add up. Their constants were timed on one
thread of a CPU, against a product of two float32 matrices of width 512.
"""

import math
from dataclasses import dataclass

DOUBLE = 2.0
"""how many times as long an operation takes in float64 as in float32"""


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


def product(rows: int, inner: int, columns: int) -> float:
    """Return the flops of a product [rows, inner] x [inner, columns] in float32."""
    return 2.0 * rows * inner * columns


def factor(width: int) -> float:
    """Return the flops of a Cholesky factor of a [width, width] matrix in float64."""
    return 1.6 * width**3


def inverse(width: int) -> float:
    """Return the flops of the inverse of a positive definite [width, width] matrix in float64, by its factor."""
    return factor(width) + 3.0 * width**3


def eigenvectors(width: int) -> float:
    """Return the flops of an eigendecomposition of a symmetric [width, width] matrix in float32."""
    return 11.0 * width**3


def sweeps(count: float, *shape: int) -> float:
    """Return the flops in whose time `count` elementwise operations on a float32 tensor are done."""
    return 40.0 * count * math.prod(shape)


def selection(*shape: int) -> float:
    """Return the flops in whose time the largest entries of a float32 tensor are found."""
    return 1200.0 * math.prod(shape)


def storage(outputs: int, inputs: int, square: float, mixed: float, outer: float = 0.0) -> float:
    """Return square inputs^2 + mixed inputs outputs + outer outputs^2, the form of all fits of peak memory.

    The coefficients are bytes for a float32 problem, fitted by benchmarks/workspace.py.
    """
    return square * inputs**2 + mixed * inputs * outputs + outer * outputs**2
