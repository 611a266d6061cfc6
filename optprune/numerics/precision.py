"""float32 that is float32, whatever torch was told to multiply it in, and sizes that stay in its range."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32 = "ieee"
"""torch's word for products of float32 in float32"""


def excess(size: float, most: int) -> float:
    """The power of two that takes a size to about 1 if it is above 2^most or below 2^-most, else 1."""
    exponent = math.frexp(size)[1] if size > 0 else 0
    return 1.0 if abs(exponent) <= most else 2.0**-exponent


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever torch was told and by whichever of its two ways; put back then.

    Also a decorator. Within another such context nothing is set, so that threads may enter and leave theirs there.
    """
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]  # made when torch is imported
    )
    before = [backend.fp32_precision for backend in backends]
    if before == [FLOAT32] * len(before):
        yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to say so after `fp32_precision` was set to something else.
        older = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            # What is inherited is told like what was set: it is inherited again where that gives the same.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
