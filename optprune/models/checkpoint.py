"""A checkpoint: the safetensors files of a model, of which single tensors are read when they are asked for."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.models.weights_files import weights_files

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LONGEST_HEADER = 100_000_000
"""the most bytes of a header: safetensors itself reads no longer one"""
FETCH = "fetch it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """the place of the first byte, from the beginning of the file"""
    turned: bool = False
    """whether the file has it transposed"""

    def transposed(self) -> "StoredTensor":
        """The same matrix as [out, in], where the file has [in, out]."""
        return replace(self, shape=self.shape[::-1], turned=not self.turned)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor in memory of its own: a map of the file would count as this process's memory, all of it."""
        data = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(data.numpy().data) != self.bytes:
                raise InputError(f"{self.file.name} is cut short: {FETCH}")
        found = data.view(self.dtype)
        return found.reshape(self.shape[::-1]).t() if self.turned else found.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model's safetensors files, by name; nothing of them is held."""

    source: str
    """the name that the user calls it by"""
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path, source: str = "") -> "Checkpoint":
        """The weights in a model folder (or of a hub name), of one file or of shards named by an index.

        InputError for anything but safetensors of the folder's own, and for files that are not whole.
        """
        source = source or str(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in weights_files(source, str(folder)):
            for name, tensor in stored_tensors(file, source).items():
                if name in tensors:
                    raise InputError(
                        f"{name} of {source} is in two files, {tensors[name].file.name} and {file.name}: fetch both "
                        "again"
                    )
                tensors[name] = tensor
        return cls(source, tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def dtype(self) -> torch.dtype:
        """What most models have one of: that of the first tensor."""
        return next((tensor.dtype for tensor in self.tensors.values()), torch.float32)

    def read(
        self, prefix: str, names: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors below a prefix such as "model.layers.3", by what follows it; all of them, or those named.

        In their own dtype, or in another. InputError, with its name, where one of them holds NaN or infinity.
        """
        if names is None:
            names = [name.removeprefix(f"{prefix}.") for name in self.tensors if name.startswith(f"{prefix}.")]
        found = {}
        for name in names:
            full = f"{prefix}.{name}" if prefix else name
            tensor = self.tensors[full].read()
            found[name] = tensor if dtype is None else tensor.to(dtype)
            check_finite(full, found[name], self.source)
        return found


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raise InputError where a weight holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} of {source} holds NaN or infinity: the checkpoint is damaged, fetch it again")


def stored_tensors(file: Path, source: str) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by its header; InputError where that is not whole, or not of plain floats.

    The tensors fill the file: there is nothing between two of them, and nothing behind the last one.
    """
    what = f"{file.name} of {source}"
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise InputError(f"{what} is no whole safetensors file: {FETCH}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _stored(file, what, entry, 8 + length) for name, entry in header.items()}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the header of {what} is damaged: {FETCH}") from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if tensor.begin + tensor.bytes > size:
            raise InputError(f"{what} is cut short, {name} is not whole in it: {FETCH}")
        if tensor.begin != end:
            raise InputError(
                f"the header of {what} is damaged, {name} does not begin where the one before ends: {FETCH}"
            )
        end += tensor.bytes
    if end != size:
        raise InputError(
            f"{what} has {size - end} bytes behind its last tensor, so it is not as it was written: {FETCH}"
        )
    return found


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor], values: Iterable[Tensor] | None = None) -> None:
    """Write tensors as a safetensors file does, without a copy of them all.

    Where they are read one after the other, `tensors` may be on the meta device, and `values` gives what they hold.
    """
    kinds = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    stream.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in zip(tensors, tensors.values() if values is None else values, strict=True):
        assert tensor.shape == tensors[name].shape and tensor.dtype == tensors[name].dtype
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)


def _stored(file: Path, what: str, entry: Any, data: int) -> StoredTensor:
    if entry["dtype"] not in FLOATS:
        raise InputError(
            f"{what} holds tensors of {entry['dtype']}, and pruning needs plain weights: load the unquantised original"
        )
    begin, end = map(int, entry["data_offsets"])
    tensor = StoredTensor(file, FLOATS[entry["dtype"]], tuple(map(int, entry["shape"])), data + begin)
    if begin < 0 or min(tensor.shape, default=0) < 0 or end - begin != tensor.bytes:
        raise InputError(f"the header of {what} is damaged, a tensor's bytes are not those of its shape: {FETCH}")
    return tensor
