"""float32 that is float32: torch may have been told to multiply it in TF32 or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32 = "ieee"
"""torch's word for products of float32 in float32"""


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
