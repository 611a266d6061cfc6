"""The store of a model's blocks: read from a checkpoint one at a time, and put aside once they are pruned.

A skeleton is a model whose decoder blocks are on the meta device, where a tensor has a shape and no memory; all that
every pass needs (embeddings, norms, head, buffers) is there.
"""

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from optprune.models.checkpoint import Checkpoint, stored_tensors, write_tensors
from optprune.models.places import InFile
from optprune.models.surgery import put_parameters
from optprune.system.files import write_whole

Keep = Callable[[str, Callable[[BinaryIO], object]], object]
"""takes the name of a file, and what writes its bytes to a stream"""


class BlockSink(ABC):
    """A place that pruned blocks go to, and come from when they are needed again."""

    @abstractmethod
    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a block, called as in the checkpoint ("model.layers.3"), with its tensors by their names within it."""

    @abstractmethod
    def take(self, block: str) -> None:
        """Count a block as written that an earlier run has left there."""

    @abstractmethod
    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        """These tensors of a block as it was written last; None where it was not."""


class ShardSink(BlockSink):
    """One safetensors file for each block, in a folder: whole or not there."""

    def __init__(self, folder: Path, keep: Keep | None = None) -> None:
        """`keep` writes a file of the folder, whole or not at all, by its name."""
        self.folder, self._keep = folder, keep
        self.done = set[str]()
        """the blocks that are there; files of other blocks do not count, whatever their names"""

    def file(self, block: str) -> Path:
        """The file of a block, there or not."""
        return self.folder / f"{block}.safetensors"

    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        named = {f"{block}.{name}": tensor for name, tensor in tensors.items()}
        write = partial(write_tensors, tensors=named)
        if self._keep is None:
            write_whole(self.file(block), write)
        else:
            self._keep(self.file(block).name, write)
        self.done.add(block)

    def take(self, block: str) -> None:
        self.done.add(block)

    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        file = self.file(block)
        if block not in self.done:
            return None
        return Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(block, names)


class Nowhere(BlockSink):
    """Keeps nothing: for a process whose pruned blocks another one keeps."""

    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        pass

    def take(self, block: str) -> None:
        pass

    def read(self, block: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        return None


class BlockStore:
    """The blocks of a skeleton: from a checkpoint, or once pruned from a sink. Only those in use take memory."""

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        sink: BlockSink | None = None,
        scratch: Path | None = None,
    ) -> None:
        """`blocks` by their names in the checkpoint. Without a `sink` they go where all goes that does not stay.

        That is a folder of this store's own, made in `scratch` or in the system's folder of temporary files.
        """
        self.checkpoint, self.device, self.dtype, self._place = checkpoint, device, dtype, scratch
        self._names = {block: name for name, block in blocks.items()}
        self._sink = sink
        self._scratch: Path | None = None
        self._in_use: set[nn.Module] = set()

    @contextmanager
    def resident(self, block: nn.Module, keep: bool) -> Iterator[None]:
        """A block in memory for as long as the context lasts; within another such context of it nothing happens.

        What became of its weights is forgotten then; with `keep` it goes into the sink, unless an error ended it.
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
        # A part that is removed meanwhile is not read.
        names = [name for name, _ in block.named_parameters()]
        found = None if self._sink is None else self._sink.read(prefix, names)
        if found is None:
            found = self.checkpoint.read(prefix, names, self.dtype)
        put_parameters(block, {name: found[name].to(self.device, self.dtype) for name in names})

    def take_from_sink(self, block: nn.Module) -> None:
        """Let a block be what an earlier run left of it in the sink; it has the shapes for it already."""
        self.sink.take(self._names[block])

    @cached_property
    def aside(self) -> InFile:
        """Where what nobody needs for a while is out of memory."""
        return InFile(self.scratch("aside"))

    @property
    def sink(self) -> BlockSink:
        """The place that pruned blocks go to."""
        if self._sink is None:
            self._sink = ShardSink(self.scratch("pruned"))
        return self._sink

    def scratch(self, name: str) -> Path:
        """A folder for what does not stay, which is deleted with the store at the latest."""
        if self._scratch is None:
            holder = tempfile.TemporaryDirectory(prefix="optprune-", dir=self._place, ignore_cleanup_errors=True)
            weakref.finalize(self, holder.cleanup)
            self._scratch = Path(holder.name)
        folder = self._scratch / name
        folder.mkdir(exist_ok=True)
        return folder
