"""Safetensors files of a model: found, checked, and read or written one tensor at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from optprune.errors import InputError
from optprune.models.architecture import KEPT_PAIRS
from optprune.models.sources import locate
from optprune.numerics.tensors import NAMES, rounded
from optprune.system.files import read_json
from optprune.system.wording import shown

DTYPES = {name: dtype for dtype, name in NAMES.items()}
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""the dtypes of weights that are not quantised"""
LONGEST_HEADER = 100_000_000
"""the most bytes of a header that safetensors reads"""
PIECE = 1 << 24
"""the number of bytes of a file that are hashed at a time"""
FETCH = "fetch it again"
ENDING = ".safetensors"

BESIDE = "hf_quant_config.json"
"""the file in which ModelOpt says how a model is quantised, in older folders there alone"""


def is_plain(name: str, dtype: torch.dtype) -> bool:
    """Return whether a tensor with a name in the files is of a dtype of plain weights, or lists rotary pairs."""
    return dtype in PLAIN or (dtype == torch.int64 and name.endswith(f".{KEPT_PAIRS}"))


class InFiles(Protocol):
    """A tensor in files, of which parts can be read."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is read."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it."""
        ...

    def transposed(self) -> Self:
        """Return the transposed matrix."""
        ...

    def item(self, number: int) -> Self:
        """Return one of the tensors of which the first dimension counts the number."""
        ...

    def rows(self, taken: range) -> Self:
        """Return some of the rows, in memory of their own where they do not follow one another in the file."""
        ...

    def read(self) -> Tensor:
        """Return the values in new memory."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """the offset of the first byte in the file"""
    stored_transposed: bool = False
    """whether the file holds the transposed matrix"""
    version: tuple[int, int, int] | None = None
    """the identity and time of the file when its header was read; None accepts the file as it is now"""
    taken: range | None = None
    """the rows that it consists of, of a larger matrix in the file; None for one that the file holds as it is"""
    among: int = 0
    """the number of rows of that matrix"""

    def transposed(self) -> Self:
        """Return the same matrix as [out, in], where the file has [in, out]."""
        return replace(self, shape=self.shape[::-1], stored_transposed=not self.stored_transposed)

    def item(self, number: int) -> Self:
        """Return one of the tensors of which the first dimension counts the number."""
        one = replace(self, shape=self.shape[1:])
        return replace(one, begin=self.begin + number * one.bytes)

    def rows(self, taken: range) -> Self:
        """Return some of the rows, in memory of their own where they do not follow one another in the file."""
        if taken.step == 1 and not self.stored_transposed:
            row = replace(self, shape=self.shape[1:]).bytes
            return replace(self, shape=(len(taken), *self.shape[1:]), begin=self.begin + taken.start * row)
        return replace(self, shape=(len(taken), *self.shape[1:]), taken=taken, among=self.shape[0])

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it."""
        return (self.file,)

    @property
    def bytes(self) -> int:
        """The size in bytes of what is read for it."""
        return math.prod(self._stored_shape) * self.dtype.itemsize

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.taken is None else (self.among, *self.shape[1:])

    def read(self) -> Tensor:
        """Return the tensor in new memory: a memory map of the whole file would count as this process's memory."""
        data = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            if self.version not in (None, _file_version(file)):
                raise InputError(
                    f"{self.file.name} changed after its header was read, so its weights may be of two models: start "
                    "again, and do not write to it during the run"
                )
            file.seek(self.begin)
            if file.readinto(data.numpy().data) != self.bytes:
                raise InputError(f"{self.file.name} is cut short: {FETCH}")
        shape, found = self._stored_shape, data.view(self.dtype)
        found = found.reshape(shape[::-1]).t() if self.stored_transposed else found.reshape(shape)
        if self.taken is None:
            return found
        return found[self.taken.start : self.taken.stop : self.taken.step].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model's safetensors files by name; their values are read on demand."""

    source: str
    """the source as the user named it"""
    tensors: Mapping[str, InFiles]

    @classmethod
    def open(
        cls, folder: str | Path, source: str = "", accepts: Callable[[str, torch.dtype], bool] = is_plain
    ) -> "Checkpoint":
        """Return the weights in a model folder (or of a hub name), in one file or in the shards of an index.

        InputError for anything but safetensors in the folder itself, for files that are not whole, and for tensors
        that `accepts` refuses by their name and dtype.
        """
        source = source or str(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in weights_files(source, str(folder)):
            for name, tensor in stored_tensors(file, source, accepts).items():
                if name in tensors:
                    raise InputError(
                        f"{name} of {source} is in two files, {tensors[name].file.name} and {file.name}: fetch both "
                        "again"
                    )
                tensors[name] = tensor
        return cls(source, tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(dict.fromkeys(file for tensor in self.tensors.values() for file in tensor.files))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor of floats; most models have one dtype."""
        floats = (tensor.dtype for tensor in self.tensors.values() if tensor.dtype.is_floating_point)
        return next(floats, torch.float32)

    def read(
        self, prefix: str, names: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors below a prefix such as "model.layers.3", all or those named, by the rest of their names.

        They are converted to `dtype` where one is given. InputError where one of them holds NaN or infinity.
        """
        if names is None:
            names = [name.removeprefix(f"{prefix}.") for name in self.tensors if name.startswith(f"{prefix}.")]
        found = {}
        for name in names:
            full = f"{prefix}.{name}" if prefix else name
            tensor = self.tensors[full].read()
            found[name] = tensor if dtype is None else rounded(f"{full} of {self.source}", tensor, dtype, "load it as")
            check_finite(full, found[name], self.source)
        return found


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raise InputError where a weight holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} of {source} holds NaN or infinity: the checkpoint is damaged, fetch it again")


def stored_tensors(
    file: Path, source: str, accepts: Callable[[str, torch.dtype], bool] = is_plain
) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file's header lists; InputError where it is damaged or lists other dtypes.

    The tensors must fill the file, with no bytes between them or behind the last one, and `accepts` must be true of
    the name and dtype of each.
    """
    what = f"{file.name} of {source}"
    with file.open("rb") as stream:
        version = _file_version(stream)
        size, first = version[1], stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise InputError(f"{what} is not a whole safetensors file: {FETCH}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _stored(file, what, entry, 8 + length, version) for name, entry in header.items()}
        for name, tensor in found.items():
            if not accepts(name, tensor.dtype):
                raise _not_plain(what, header[name]["dtype"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the header of {what} is damaged: {FETCH}") from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if tensor.begin + tensor.bytes > size:
            raise InputError(f"{what} is cut short in the tensor {name}: {FETCH}")
        if tensor.begin != end:
            raise InputError(
                f"the header of {what} is damaged, {name} does not begin where the tensor before it ends: {FETCH}"
            )
        end += tensor.bytes
    if end != size:
        raise InputError(f"{what} has {size - end} bytes after its last tensor, so it was changed: {FETCH}")
    return found


def _file_version(stream: BinaryIO) -> tuple[int, int, int]:
    """Return the inode of a stream's file, its size in bytes, and the time of its last change."""
    status = os.fstat(stream.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _stored(file: Path, what: str, entry: Any, data: int, version: tuple[int, int, int]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise _not_plain(what, entry["dtype"])
    begin, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    tensor = StoredTensor(file, DTYPES[entry["dtype"]], shape, data + begin, version=version)
    if begin < 0 or min(tensor.shape, default=0) < 0 or end - begin != tensor.bytes:
        raise InputError(f"the header of {what} is damaged, a tensor's bytes are not those of its shape: {FETCH}")
    return tensor


def _not_plain(what: str, dtype: str) -> InputError:
    return InputError(
        f"{what} holds tensors of {dtype}, but pruning needs plain weights: load the unquantised original"
    )


# -- the files of a model


def check_weights_named(config: PretrainedConfig, source: str) -> None:
    """Raise InputError where a config names the file of its weights, which could be anywhere and in any format."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise InputError(
            f"the config of {source} names its weights (transformers_weights {shown(named)}), but only "
            f"{SAFE_WEIGHTS_NAME} or its shards are read: rename the file, and remove the field from config.json"
        )


def has_weights(source: str) -> bool:
    """Return whether a model source holds weights, and not just a config."""
    return not Path(source).is_dir() or any(Path(source).glob(f"*{ENDING}"))


def check_weights_files(source: str, where: str) -> None:
    """Raise InputError where the weights of a folder or hub name are not safetensors files of its own.

    Shards may be links, as in the hub's cache, but their names may not lead out of the folder.
    """
    if own_or_cached(where, SAFE_WEIGHTS_NAME) is None:  # the index is not read then
        _shards(source, where)  # from_pretrained says what is missing


def weights_files(source: str, where: str) -> list[Path]:
    """Return the safetensors files of a folder or hub name; InputError where one of them is missing."""
    whole = own_or_cached(where, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [Path(whole)]
    names = _shards(source, where)
    files = {name: own_or_cached(where, name) for name in names}
    missing = [name for name, file in files.items() if file is None] if names else [SAFE_WEIGHTS_NAME]
    if missing:
        raise InputError(f"the weights of {source} are incomplete: there is no {missing[0]}; copy the folder again")
    return [Path(file) for file in files.values() if file is not None]


def _shards(source: str, where: str) -> list[str]:
    """Return the shards named by an index, which must be safetensors in the folder itself; none without an index."""
    index = own_or_cached(where, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    what = f"{SAFE_WEIGHTS_INDEX_NAME} of {source}"
    try:
        text = Path(index).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8: fetch it again") from error
    data = read_json(text, what)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{what} has no weight_map that says which tensor is in which file: fetch it again")
    for name in shards.values():
        if not _is_own(name):
            raise InputError(
                f"{what} names {shown(name)} for weights, but only safetensors in the folder itself are read, such as "
                f"model-00001-of-00002{ENDING}: fetch the weights again as safetensors"
            )
    return sorted(set(shards.values()))


def own_or_cached(where: str, name: str) -> str | None:
    """Return the path of a file of a model folder or hub name; None where it or the hub is not found."""
    return cached_file(
        where, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _is_own(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(ENDING):
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def digest_of_source(source: str) -> str:
    """Return a SHA-256 hex digest of the weights files of a model source."""
    where, options = locate(source)
    gguf = options.get("gguf_file")
    return digest_of_files([Path(where, str(gguf))] if gguf else weights_files(source, where))


def digest_of_files(files: Sequence[Path], on_bytes: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Return a SHA-256 hex digest of the bytes of files; `on_bytes` receives the number of bytes read and the total."""
    digest, done = hashlib.sha256(), 0
    size = sum(file.stat().st_size for file in files)
    for file in files:
        of_file = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                of_file.update(piece)
                on_bytes(done := done + len(piece), size)
        digest.update(of_file.digest())
    return digest.hexdigest()


def stated(config: Any, where: str) -> Any:
    """Return a model's quantization_config, or else the one in ModelOpt's own file; None without both."""
    file = own_or_cached(where, BESIDE) if config is None else None
    if file is None:
        return config
    content = read_json(Path(file).read_text(encoding="utf-8"), BESIDE)
    fields = content.get("quantization") if isinstance(content, dict) else None
    if not isinstance(fields, dict):
        raise InputError(f"{BESIDE} does not say how the model is quantised: correct it, or fetch it again")
    return {"quant_method": "modelopt", **fields} if fields.get("quant_algo") is not None else None
