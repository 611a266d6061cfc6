"""Weights of a GGUF file, decoded into the model that the file was written from: its quality without llama.cpp."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel

from optprune.errors import OptpruneError
from optprune.export.exporter import ModelSource
from optprune.export.gguf_file import GgufFile
from optprune.export.gguf_tensors import Target
from optprune.models import Decoder
from optprune.models.gguf import PlainReader


@torch.no_grad()
def decode_into(model: PreTrainedModel, file: Path, source: ModelSource, exporter: GgufFile) -> None:
    """Replace the matrices of a model by those of a GGUF file, which `exporter` wrote from the folder `source`.

    `model` is loaded from that folder. Rows and columns return to their places in the model, zeros that fill up blocks
    are left out, and numbers that were multiplied are divided again, so that the model computes with the numbers that
    llama.cpp reads. Vectors, which files hold in float32, stay. Raises OptpruneError where a tensor is not in the file.
    """
    parameters = dict(Decoder(model).model.named_parameters())
    tensors = {tensor.name: tensor for tensor in PlainReader(file).tensors}
    for target in exporter.targets(source):
        of_a_vector = len(target.sources) == 1 and len(target.sources[0][1].shape) < 2
        if len(target.shape) < 2 or not target.sources or of_a_vector:
            continue
        if target.name not in tensors:
            raise OptpruneError(f"{file} has no tensor {target.name}: export the model again")
        tensor = tensors[target.name]
        plain = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(target.shape)
        before = [parameters[name] for name, _ in target.sources]
        for parameter, part in zip(before, _in_their_places(target, plain, before), strict=True):
            parameter.copy_(part)


def _in_their_places(target: Target, plain: torch.Tensor, before: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the model's tensors from the tensor of the file, by the places that numbers have in the file.

    Numbers that the file has in another tensor stay as they are `before`.
    """
    shapes = [torch.Size(stored.shape) for _, stored in target.sources]
    if target.factor is not None:
        factors = target.arranged([target.factor.expand(shape) for shape in shapes])
        plain = torch.where(factors == 0, plain, plain / factors)
    total = sum(shape.numel() for shape in shapes)
    # Number one stands for the first entry: zeros in the file are no entry of the model.
    numbers = torch.arange(1, total + 1).split([shape.numel() for shape in shapes])
    places = target.arranged([part.view(shape) for part, shape in zip(numbers, shapes, strict=True)]).flatten()
    found = torch.cat([part.reshape(-1).to(plain.dtype) for part in before])
    found[places[places > 0] - 1] = plain.flatten()[places > 0]
    parts = found.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
