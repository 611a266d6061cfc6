"""Stores of a skeleton's blocks: read from a checkpoint one at a time, and written to a sink once they are pruned.

The decoder blocks of a skeleton are on the meta device, where a tensor has a shape and no memory; the embeddings,
norms, head and buffers are in memory.
"""

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.models.places import InFile
from optprune.models.surgery import put_parameters
from optprune.numerics.tensors import write_tensors
from optprune.system.files import write_whole

Keep = Callable[[str, Callable[[BinaryIO], object]], object]
"""a function that writes a file, given its name and a function that writes its bytes to a stream"""


class BlockSink(ABC):
    """A destination of pruned blocks, from which they are read when they are needed again."""

    @abstractmethod
    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a block, named as in the checkpoint ("model.layers.3"), with its tensors by their names within it."""

    @abstractmethod
    def mark_written(self, block: str) -> None:
        """Count a block as written that an earlier run has written."""

    @abstractmethod
    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        """Return these tensors of a block as last written; None where it was not written."""


class ShardSink(BlockSink):
    """A folder with one safetensors file for each block, which is whole or absent."""

    def __init__(self, folder: Path, keep: Keep | None = None) -> None:
        """Use a folder; `keep` writes a file in it by its name, completely or not at all."""
        self.folder, self._keep = folder, keep
        self.done = set[str]()
        """the blocks that are written; files of other blocks are ignored"""

    def file(self, block: str) -> Path:
        """Return the path of a block's file, whether or not it exists."""
        return self.folder / f"{block}.safetensors"

    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        named = {f"{block}.{name}": tensor for name, tensor in tensors.items()}
        write = partial(write_tensors, tensors=named)
        if self._keep is None:
            write_whole(self.file(block), write)
        else:
            self._keep(self.file(block).name, write)
        self.done.add(block)

    def mark_written(self, block: str) -> None:
        self.done.add(block)

    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        file = self.file(block)
        if block not in self.done:
            return None
        return Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(block, names)


class NullSink(BlockSink):
    """A sink that keeps nothing, for a process whose pruned blocks another process writes."""

    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        pass

    def mark_written(self, block: str) -> None:
        pass

    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        return None


class BlockStore:
    """The blocks of a skeleton, read from a checkpoint, or once pruned from a sink. Only blocks in use take memory."""

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        sink: BlockSink | None = None,
        scratch: Path | None = None,
        float32: Collection[str] = (),
    ) -> None:
        """Read `blocks`, keyed by their names in the checkpoint; the parameters `float32` of each have that dtype.

        Without a `sink` pruned blocks go into this store's temporary folder, which is made in `scratch` or in the
        system's temporary folder.
        """
        self.checkpoint, self.device, self.dtype, self._place = checkpoint, device, dtype, scratch
        self._names = {block: name for name, block in blocks.items()}
        self._sink, self._float32 = sink, frozenset(float32)
        self._scratch: Path | None = None
        self._in_use: set[nn.Module] = set()

    @contextmanager
    def resident(self, block: nn.Module, keep: bool) -> Iterator[None]:
        """Hold a block in memory within the context; a nested context of the same block does nothing.

        At the end its weights are written to the sink with `keep`, and dropped without it or after an error.
        """
        if block in self._in_use:
            yield
            return
        self._in_use.add(block)
        try:
            self._load(block)
            yield
            if keep:
                self.sink.write(self._names[block], {name: part.detach() for name, part in block.named_parameters()})
        finally:
            put_parameters(block, {name: torch.empty_like(w, device="meta") for name, w in block.named_parameters()})
            self._in_use.discard(block)

    def _load(self, block: nn.Module) -> None:
        prefix = self._names[block]
        # A part that was removed is not read.
        dtypes = {name: self._dtype(name, weight) for name, weight in block.named_parameters()}
        found = None if self._sink is None else self._sink.read(prefix, dtypes)
        if found is None:
            found = {}
            for dtype in dict.fromkeys(dtypes.values()):
                found |= self.checkpoint.read(prefix, [name for name, own in dtypes.items() if own == dtype], dtype)
        put_parameters(block, {name: found[name].to(self.device, dtype) for name, dtype in dtypes.items()})

    def _dtype(self, name: str, weight: Tensor) -> torch.dtype:
        """Return the dtype in memory of a block's parameter: whole numbers keep theirs."""
        if not weight.is_floating_point():
            return weight.dtype
        return torch.float32 if name in self._float32 else self.dtype

    def mark_written(self, block: nn.Module) -> None:
        """Read a block from the sink from now on, where an earlier run wrote it; it has those shapes already."""
        self.sink.mark_written(self._names[block])

    @cached_property
    def offload(self) -> InFile:
        """The file for tensors that are not needed for a while."""
        return InFile(self.scratch("offload"))

    @property
    def sink(self) -> BlockSink:
        """The destination of pruned blocks."""
        if self._sink is None:
            self._sink = ShardSink(self.scratch("pruned"))
        return self._sink

    def scratch(self, name: str) -> Path:
        """Return a temporary folder of this name, which is deleted with the store at the latest."""
        if self._scratch is None:
            holder = tempfile.TemporaryDirectory(prefix="optprune-", dir=self._place, ignore_cleanup_errors=True)
            weakref.finalize(self, holder.cleanup)
            self._scratch = Path(holder.name)
        folder = self._scratch / name
        folder.mkdir(exist_ok=True)
        return folder
