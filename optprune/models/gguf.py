"""GGUF files: turned into one file of plain weights once, so that their blocks can be read one at a time.

The names and the order of rows are those of transformers, whose own tables say them, and so is every number.
"""

import hashlib
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from optprune.errors import InputError
from optprune.models.checkpoint import Checkpoint, stored_tensors, write_tensors
from optprune.system.files import write_whole

CONVERTED = "converted"
"""the folder of converted files, in a scratch folder"""


def converted(file: Path, model: PreTrainedModel, dtype: torch.dtype, scratch: Path | None, source: str) -> Checkpoint:
    """The weights of a GGUF file in a dtype, by the names that a model (which may be a skeleton) has for them.

    They are in one safetensors file in `scratch`, written tensor by tensor: one at a time is in memory. Where an
    earlier call has left it there, whole and of a file of the same bytes, it is taken as it is. Without a `scratch` it
    is in the system's folder of temporary files, and goes with the model.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if scratch is None:
        holder = tempfile.TemporaryDirectory(prefix="optprune-", ignore_cleanup_errors=True)
        weakref.finalize(model, holder.cleanup)
        scratch = Path(holder.name)
    folder = scratch / CONVERTED
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{digest}-{str(dtype).removeprefix('torch.')}.safetensors"
    if not place.is_file():
        parts = _parts(file, model)
        tensors = {name: torch.empty(part.shape, dtype=dtype, device="meta") for name, part in parts.items()}
        values = (part.read().to(dtype) for part in parts.values())
        write_whole(place, lambda stream: write_tensors(stream, tensors, values))
    return Checkpoint(source, stored_tensors(place, source))


class _Part:
    """One tensor of a GGUF file."""

    def __init__(self, file: Path, tensor: Any, processor: TensorProcessor) -> None:
        self._file, self._tensor, self._processor = file, tensor, processor
        self.shape = tuple(int(size) for size in reversed(tensor.shape))

    def read(self) -> Tensor:
        """The tensor in memory of its own: a map of the file would count as this process's memory, all of it."""
        tensor = self._tensor
        packed = np.fromfile(self._file, tensor.data.dtype, tensor.data.size, offset=int(tensor.data_offset))
        plain = dequantize(packed.reshape(tensor.data.shape), tensor.tensor_type)
        weights: Any = self._processor.process(weights=plain, name=tensor.name)
        return torch.from_numpy(np.ascontiguousarray(weights.weights))


def _parts(file: Path, model: PreTrainedModel) -> dict[str, _Part]:
    """The tensors of a file that have a place in a model, by their names there."""
    reader, config = GGUFReader(file), load_gguf_checkpoint(str(file))["config"]
    processor = TENSOR_PROCESSORS.get(config["model_type"], TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    found = {names[tensor.name]: _Part(file, tensor, processor) for tensor in reader.tensors if tensor.name in names}
    if not found:
        raise InputError(f"{file} holds no weights of a {model.config.model_type} model: fetch it again")
    return found
