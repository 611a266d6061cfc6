"""Full precision of float32 products, for all settings of torch, and scales that stay in the range of float32."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32 = "ieee"
"""torch's name for products of float32 in float32"""


def excess(size: float, most: int, dtype: torch.dtype) -> float:
    """Return the power of two that scales a size to about 1 if it is above 2^most or below 2^-most, else 1.

    It is a number of the dtype, so a subnormal size stays below 1.
    """
    exponent = math.frexp(size)[1] if size > 0 else 0
    largest = math.frexp(torch.finfo(dtype).max)[1] - 1
    return 1.0 if abs(exponent) <= most else 2.0 ** min(-exponent, largest)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch to products of float32 matrices in float32 within the context, and restore the settings of torch after it.

    It is also a decorator. Within another such context nothing is set, so threads may enter and leave theirs.
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
        # torch raises where `fp32_precision` was set to something else.
        older = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            # An inherited precision reads like a set one: it is inherited again where that gives the same.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
