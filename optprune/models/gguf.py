"""GGUF files: read as transformers reads them, or converted to safetensors once, so that blocks can be read one by one.

Names, the order of rows and the dequantised numbers come from the tables and functions of transformers and gguf.
"""

import copy
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from optprune.errors import InputError
from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.numerics.tensors import write_tensors
from optprune.system.files import digest_of_file, is_own_file, write_whole

CONVERTED = "converted"
"""the folder of converted files, in a scratch folder"""
_SUBSTITUTION = threading.Lock()


class PlainReader(GGUFReader):
    """gguf's reader on a plain array: the million slices of a vocabulary take seconds on a `numpy.memmap`."""

    @property
    def data(self) -> Any:
        """The mapped bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = np.asarray(mapped)


@contextmanager
def _plain_readers() -> Iterator[None]:
    """Let transformers, which looks up gguf's reader for each file, use `PlainReader` within the context."""
    with _SUBSTITUTION:
        original, gguf.GGUFReader = gguf.GGUFReader, PlainReader
        try:
            yield
        finally:
            gguf.GGUFReader = original


def gguf_config(folder: str, gguf_file: str) -> PretrainedConfig:
    """Return the config in a GGUF file, as transformers reads it. Parsing takes seconds, so the last one is cached."""
    return copy.deepcopy(_config(*_file_version(Path(folder, gguf_file))))


def gguf_tokenizer(folder: str, gguf_file: str) -> Tokenizer:
    """Return the tokenizer in a GGUF file, as transformers reads it; the last one is cached."""
    return copy.deepcopy(_tokenizer(*_file_version(Path(folder, gguf_file))))


def _file_version(file: Path) -> tuple[Path, int, int]:
    """Return the key of a file's cached contents, which differs once the file has changed."""
    status = file.stat()
    return file, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _config(file: Path, size: int, changed: int) -> PretrainedConfig:
    with _plain_readers():
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)


@lru_cache(maxsize=1)
def _tokenizer(file: Path, size: int, changed: int) -> Tokenizer:
    with _plain_readers():
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)


def converted(file: Path, model: PreTrainedModel, dtype: torch.dtype, scratch: Path | None, source: str) -> Checkpoint:
    """Return the weights of a GGUF file in a dtype, by their names in a model (which may be a skeleton).

    They are written to one safetensors file in `scratch`, one tensor at a time. A file that an earlier call has written
    from the same bytes is used again if it still has the digest that was stored beside it. Without a `scratch` the file
    is in the system's temporary folder, and is deleted with the model. Raises InputError where the folder of converted
    files is a link.
    """
    digest = digest_of_file(file)
    if scratch is None:
        holder = tempfile.TemporaryDirectory(prefix="optprune-", ignore_cleanup_errors=True)
        weakref.finalize(model, holder.cleanup)
        scratch = Path(holder.name)
    folder = scratch / CONVERTED
    if folder.is_symlink():
        raise InputError(f"{folder} is a link, but converted weights are written to a folder there: move the link away")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{digest}-{str(dtype).removeprefix('torch.')}.safetensors"
    known = place.with_name(f"{place.name}.sha256")
    if not (is_own_file(place) and is_own_file(known) and digest_of_file(place).encode() == known.read_bytes()):
        parts = tensors_in(file, model)
        tensors = {name: torch.empty(part.shape, dtype=dtype, device="meta") for name, part in parts.items()}
        values = (part.read().to(dtype) for part in parts.values())
        written: list[str] = []
        write_whole(place, lambda stream: write_tensors(stream, tensors, values), commit=written.append)
        write_whole(known, lambda stream: stream.write(written[0].encode()))
    return Checkpoint(source, stored_tensors(place, source))


class GgufTensor:
    """One tensor of a GGUF file."""

    def __init__(self, file: Path, tensor: Any, processor: TensorProcessor) -> None:
        self._file, self._tensor, self._processor = file, tensor, processor
        self.shape = tuple(int(size) for size in reversed(tensor.shape))
        self.dtype, self._transposed = torch.float32, False

    def transposed(self) -> "GgufTensor":
        """Return the same matrix as [out, in], where the stock class has [in, out]."""
        other = copy.copy(self)
        other.shape, other._transposed = self.shape[::-1], not self._transposed
        return other

    def read(self) -> Tensor:
        """Return the tensor in new memory: a memory map of the whole file would count as this process's memory."""
        tensor = self._tensor
        packed = np.fromfile(self._file, tensor.data.dtype, tensor.data.size, offset=int(tensor.data_offset))
        with np.errstate(all="ignore"):  # a damaged scale gives NaN or infinity, which the users of a weight refuse
            plain = dequantize(packed.reshape(tensor.data.shape), tensor.tensor_type)
        weights: Any = self._processor.process(weights=plain, name=tensor.name)
        found = torch.from_numpy(np.ascontiguousarray(weights.weights))
        return found.t() if self._transposed else found


def tensors_in(file: Path, model: PreTrainedModel) -> dict[str, GgufTensor]:
    """Return the tensors of a file that have a place in a model (which may be a skeleton), by their names there."""
    reader, config = PlainReader(file), model.config.to_dict()
    kind = reader.fields["general.architecture"].contents()  # not the config's model_type: gemma3 for gemma3_text
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=config)
    # transformers asks every module inside the model for its names too, which takes seconds and finds the same ones.
    whole: Any = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
    names = get_gguf_hf_weights_map(whole, processor)
    found = {
        names[tensor.name]: GgufTensor(file, tensor, processor) for tensor in reader.tensors if tensor.name in names
    }
    if not found:
        raise InputError(f"{file} holds no weights of a {model.config.model_type} model: fetch it again")
    return found
