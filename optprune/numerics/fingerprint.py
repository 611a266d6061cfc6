"""A content hash for frozen dataclasses of tensors and plain data."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

LATER = "later"
"""the metadata of a field that was added later: None, as before, gives the fingerprint of an earlier version"""
PART = 1 << 22
"""the number of entries of a tensor that are copied at a time"""


def fingerprint(value: Any) -> str:
    """Return a SHA-256 hex digest of the content of a dataclass, the same on every device."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        for part in torch.split(value.detach().cpu().reshape(-1), PART):
            # A copy, because a single number counts as contiguous with any stride, and then cannot be viewed as bytes.
            digest.update(part.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value):
        digest.update(type(value).__name__.encode())
        for field in dataclasses.fields(value):
            if not field.compare:
                continue  # derived knowledge, not content
            if field.metadata.get(LATER) and getattr(value, field.name) is None:
                continue
            digest.update(field.name.encode())
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    else:
        raise TypeError(f"a fingerprint is for plain data, not for {type(value).__name__}")
