"""Weights files: safetensors shards and their index, written with one block in memory at a time."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from optprune.errors import InputError
from optprune.models import Decoder, is_stock
from optprune.models.checkpoint import InFiles, stored_tensors
from optprune.models.mixture import SeparateExperts, experts_in
from optprune.models.vision import VisionFolder, is_language
from optprune.numerics.tensors import all_finite, write_tensors
from optprune.system.files import write_whole

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True, eq=False)
class Content:
    """The tensors to write into a folder: those of a model, and those of a vision part, which are copied."""

    decoder: Decoder
    tensors: Mapping[str, Tensor]
    """all tensors in their order, by their names in the model or, around it, in its files; not all need values"""
    around: Mapping[str, InFiles] = field(default_factory=dict)
    """the tensors that are copied"""
    named: Mapping[str, str] = field(default_factory=dict)
    """the names in files of the others, where they are not those of the model"""

    @classmethod
    def of(cls, decoder: Decoder, whole: VisionFolder | None = None) -> "Content":
        """Return the content of a model's folder, or of the one of the vision-language model that it is a part of."""
        own = tensors_of(decoder)
        if whole is None:
            return cls(decoder, own)
        stored = whole.checkpoint().tensors
        named = whole.stored_names(stored, own)
        places = {there: name for name, there in named.items()}
        around = {name: tensor for name, tensor in stored.items() if not is_language(name)}
        copied = {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in around.items()}
        every, order = own | copied, [places.get(name, name) for name in stored]
        return cls(
            decoder, {name: every[name] for name in dict.fromkeys([*order, *own]) if name in every}, around, named
        )

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in a file; it is that in the model, except for stock classes."""
        if name in self.around or (not self.named and not is_stock(self.decoder.model.config)):
            return name
        return self.named.get(name) or self.decoder.architecture.checkpoint_name(name)

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the layout of the file."""
        return tensor.t() if self.decoder.architecture.is_transposed(name) else tensor

    def values(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the values of tensors in the layout of the file, with one block of those on the disk in memory."""
        model = self.decoder.model
        places = {f"{self.decoder.block_name(index)}.": index for index in range(len(self.decoder.blocks))}
        parameters, experts = dict(model.named_parameters(remove_duplicate=False)).keys(), _fused(self.decoder)
        with ExitStack() as resident:
            here: int | None = None
            for name in names:
                index = next((index for prefix, index in places.items() if name.startswith(prefix)), None)
                if index != here:
                    resident.close()
                    here = index
                    if index is not None:
                        resident.enter_context(self.decoder.resident(index))
                place, _, own = name.rpartition(".")
                if name in self.around:
                    yield self.around[name].read()
                elif place in experts:
                    yield self.turned(name, experts[place].stock_tensor(own))
                else:
                    yield self.turned(name, model.get_parameter(name) if name in parameters else model.get_buffer(name))


@dataclass(frozen=True)
class Shard:
    """Weights file to write."""

    names: tuple[str, ...]
    """the names of its tensors"""
    made: Path | None = None
    """an existing file with exactly these tensors"""


def size_of(text: str) -> int:
    """Return the bytes of a size such as 5GB, as transformers counts them. Raises InputError for other text."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    with suppress(ValueError):
        if unit in UNITS and float(number) * UNITS[unit] >= 1:
            return int(float(number) * UNITS[unit])
    raise InputError(f"the shard size {text!r} is not a number of KB, MB, GB or TB, such as {MAX_SHARD_SIZE}")


def write_weights(
    decoder: Decoder,
    folder: Path,
    most: int,
    made: Sequence[Path] = (),
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    whole: VisionFolder | None = None,
) -> None:
    """Write a model's tensors into a folder, in files of at most `most` bytes unless one tensor has more.

    Where one file is not enough, files `made` that hold a block each, under its names, are linked instead of copied.
    `on_tensor` is called with the number of tensors written and the number of all tensors. With the `whole` of a
    language part the other tensors are copied from its files.
    """
    content, done = Content.of(decoder, whole), 0
    tensors = content.tensors

    def written(more: int) -> None:
        nonlocal done
        done += more
        on_tensor(done, len(tensors))

    written(0)
    # These files hold matrices as they are in memory, and by the names there.
    linkable = decoder.architecture.stored_as_it_is and whole is None
    shards = _shards(tensors, most, made if linkable else ())
    names = [SAFE_WEIGHTS_NAME]
    if len(shards) > 1:
        stem, ending = SAFE_WEIGHTS_NAME.split(".")
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if shard.made is not None and _linked(shard.made, folder / name):
            written(len(shard.names))
        else:
            _write(content, folder / name, shard.names, lambda: written(1))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
            "weight_map": {
                content.stored_name(tensor): name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard.names
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
        write_whole(folder / SAFE_WEIGHTS_INDEX_NAME, lambda stream: stream.write(text))


def tensors_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return the tensors of a folder: every parameter once, under one of its names, and the persistent buffers.

    Where files hold all experts of a block in the stock class's tensors, these have no values here.
    """
    model, experts = decoder.model, _fused(decoder)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
    found: dict[str, Tensor] = {}
    for name, tensor in {**parameters, **buffers}.items():
        place = next((place for place in experts if name.startswith(f"{place}.")), None)
        if place is None:
            found[name] = tensor.detach()
        else:
            found |= {f"{place}.{own}": whole for own, whole in experts[place].stock_shapes().items()}
    return found


def _fused(decoder: Decoder) -> dict[str, SeparateExperts]:
    """Return the experts of each block by name, where files hold the tensors of the stock class."""
    mixture = decoder.architecture.mixture
    if mixture is None or not mixture.layout.in_files:
        return {}
    blocks = {
        decoder.name(index, mixture.experts): experts_in(block, mixture) for index, block in enumerate(decoder.blocks)
    }
    return {name: experts for name, experts in blocks.items() if isinstance(experts, SeparateExperts)}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: Mapping[str, Tensor], most: int, made: Sequence[Path]) -> list[Shard]:
    if sum(map(_bytes, tensors.values())) <= most:
        return [Shard(tuple(tensors))]
    ready = {first: shard for shard in _ready(tensors, most, made) for first in shard.names}
    shards, open_names, size = list[Shard](), list[str](), 0
    for name, tensor in tensors.items():
        done = ready.get(name)
        if open_names and (done is not None or size + _bytes(tensor) > most):
            shards.append(Shard(tuple(open_names)))
            open_names, size = [], 0
        if done is None:
            open_names.append(name)
            size += _bytes(tensor)
        elif not shards or shards[-1] is not done:
            shards.append(done)
    return [*shards, Shard(tuple(open_names))] if open_names else shards


def _ready(tensors: Mapping[str, Tensor], most: int, made: Sequence[Path]) -> Iterator[Shard]:
    """Yield the existing files that can be linked: not too large, with tensors of the right shapes and dtypes."""
    for file in made:
        if file.is_file():
            stored = stored_tensors(file, str(file.parent))
            fitting = all(
                name in tensors and (tensors[name].shape, tensors[name].dtype) == (tensor.shape, tensor.dtype)
                for name, tensor in stored.items()
            )
            if fitting and sum(tensor.bytes for tensor in stored.values()) <= most:
                yield Shard(tuple(stored), file)


def _linked(file: Path, name: Path) -> bool:
    """Give the file a second name, which takes no space, and return whether that worked."""
    with suppress(OSError):
        os.link(file, name)
        return True
    return False


def _write(content: Content, file: Path, names: Sequence[str], on_tensor: Callable[[], None]) -> None:
    """Write tensors of a content into a file."""

    def values() -> Iterator[Tensor]:
        for name, value in zip(names, content.values(names), strict=True):
            if name not in content.around and not all_finite(value):
                raise InputError(f"{name} holds NaN or infinity, so it is not saved: prune or train again in float32")
            yield value
            on_tensor()

    stored = {content.stored_name(name): content.turned(name, content.tensors[name]) for name in names}
    write_whole(file, lambda stream: write_tensors(stream, stored, values()))
