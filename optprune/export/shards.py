"""Weights files: safetensors shards and their index, written with one block in memory at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from optprune.errors import InputError
from optprune.models import Decoder, is_stock
from optprune.models.checkpoint import stored_tensors
from optprune.models.mixture import SeparateExperts, experts_in
from optprune.numerics.tensors import write_tensors
from optprune.system.files import write_whole

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_SHARD_SIZE = "5GB"


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
) -> None:
    """Write a model's tensors into a folder, in files of at most `most` bytes unless one tensor has more.

    Where one file is not enough, files `made` that hold a block each, under its names, are linked instead of copied.
    `on_tensor` is called with the number of tensors written and the number of all tensors.
    """
    tensors, done = tensors_of(decoder), 0

    def written(more: int) -> None:
        nonlocal done
        done += more
        on_tensor(done, len(tensors))

    written(0)
    # These files hold matrices as they are in memory, not transposed.
    shards = _shards(tensors, most, () if decoder.architecture.transposed else made)
    names = [SAFE_WEIGHTS_NAME]
    if len(shards) > 1:
        stem, ending = SAFE_WEIGHTS_NAME.split(".")
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if shard.made is not None and _linked(shard.made, folder / name):
            written(len(shard.names))
        else:
            _write(decoder, folder / name, {name: tensors[name] for name in shard.names}, lambda: written(1))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
            "weight_map": {
                _stored(decoder, tensor): name
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


def _write(decoder: Decoder, file: Path, tensors: Mapping[str, Tensor], on_tensor: Callable[[], None]) -> None:
    """Write a file. Of blocks that are on the disk, one at a time is in memory."""
    places = {f"{decoder.block_name(index)}.": index for index in range(len(decoder.blocks))}

    def values() -> Iterator[Tensor]:
        with ExitStack() as resident:
            here: int | None = None
            for name in tensors:
                index = next((index for prefix, index in places.items() if name.startswith(prefix)), None)
                if index != here:
                    resident.close()
                    here = index
                    if index is not None:
                        resident.enter_context(decoder.resident(index))
                place, _, own = name.rpartition(".")
                if place in experts:
                    value = experts[place].stock_tensor(own)
                else:
                    value = decoder.model.get_parameter(name) if name in parameters else decoder.model.get_buffer(name)
                yield _turned(decoder, name, value)
                on_tensor()

    experts = _fused(decoder)

    parameters = dict(decoder.model.named_parameters(remove_duplicate=False)).keys()
    stored = {_stored(decoder, name): _turned(decoder, name, tensor) for name, tensor in tensors.items()}
    write_whole(file, lambda stream: write_tensors(stream, stored, values()))


def _stored(decoder: Decoder, name: str) -> str:
    """Return the name of a tensor in a file; it is that in the model, except for stock classes."""
    return decoder.architecture.checkpoint_name(name) if is_stock(decoder.model.config) else name


def _turned(decoder: Decoder, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the layout of the file."""
    return tensor.t() if decoder.architecture.is_transposed(name) else tensor
