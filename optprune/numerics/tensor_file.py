"""Tensors in the format of a safetensors file, written to a stream one at a time."""

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""the names of dtypes in the header of a file"""
PLAIN = {"format": "pt"}
"""the metadata of weights that transformers loads"""


def write_tensors(
    stream: BinaryIO,
    tensors: Mapping[str, Tensor],
    values: Iterable[Tensor] | None = None,
    metadata: Mapping[str, str] = PLAIN,
) -> None:
    """Write tensors in the format of a safetensors file, one at a time.

    `tensors` may be on the meta device; then `values` gives their contents in the same order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    stream.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in zip(tensors, tensors.values() if values is None else values, strict=True):
        assert tensor.shape == tensors[name].shape and tensor.dtype == tensors[name].dtype
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)
