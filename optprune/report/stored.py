"""What a model source holds: its tensors, read one at a time, beside what its config says of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from optprune.models import Decoder, Draft, gguf_tensors, is_gguf, load_config, load_shapes
from optprune.models.checkpoint import Checkpoint
from optprune.models.skeleton import unexpected_tensors, with_model_names
from optprune.models.surgery import put_parameters


class Readable(Protocol):
    """A tensor that can be read when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in."""
        ...

    def read(self) -> Tensor:
        """Its values, in memory."""
        ...


@dataclass(frozen=True)
class Fault:
    """Something in a folder that is not as it should be."""

    kind: str
    """shape, missing, unknown, tied, nan, report, original or expected"""
    where: str
    """the tensor, the block or the file that it is in, or the expectation"""
    sentence: str


@dataclass(frozen=True, eq=False)
class Stored:
    """A model source as it is stored."""

    source: str
    config: PretrainedConfig
    tensors: Mapping[str, Readable]
    """the tensors, by the names that the model has for them"""
    decoder: Decoder
    """a model of the shapes that are stored, whose weights are views of a single number"""
    faults: tuple[Fault, ...]
    """what its config says otherwise"""
    ties: tuple[str, str] | None
    """the names of the head and of the embeddings, where the config says that they are one"""

    @property
    def shares_head(self) -> bool:
        """Whether head and embeddings are both stored, though the config says that they are one."""
        return self.ties is not None and all(name in self.tensors for name in self.ties)


def stored_of(source: str, draft: Draft | None = None) -> Stored:
    """What a model source holds, of which nothing is read yet but names and shapes.

    An architecture that is not known is read by a `draft`, or by that which the config carries. InputError where there
    is no config or no weights to be had.
    """
    config = load_config(source, draft)
    decoder = load_shapes(source, config)
    model, faults = decoder.model, list[Fault]()
    tensors: Mapping[str, Readable]
    if is_gguf(source):
        turned = decoder.architecture.is_transposed
        found = gguf_tensors(source, model)
        tensors = {name: tensor.transposed() if turned(name) else tensor for name, tensor in found.items()}
    else:
        checkpoint = with_model_names(model, Checkpoint.open(source))
        tensors = checkpoint.tensors
        faults += [
            Fault(
                "unknown", name, f"{name} is stored, and a {config.model_type} model of config.json has no such tensor"
            )
            for name in unexpected_tensors(model, checkpoint)
        ]
    ties = _ties(model)
    for name, weight in model.named_parameters(remove_duplicate=False):
        wanted, there = list(weight.shape), tensors.get(name)
        if there is None:
            if ties is None or name not in ties or not any(other in tensors for other in ties):
                faults.append(Fault("missing", name, f"{name} {wanted} is not stored, and config.json asks for it"))
        elif list(there.shape) != wanted:
            faults.append(
                Fault("shape", name, f"{name} is {list(there.shape)} in the weights and {wanted} by config.json")
            )
    _take_shapes(decoder, tensors)
    return Stored(source, config, tensors, decoder, tuple(faults), ties)


def _take_shapes(decoder: Decoder, tensors: Mapping[str, Readable]) -> None:
    """Let the blocks of a decoder have the shapes of these tensors, at the cost of one number each."""
    for index, block in enumerate(decoder.blocks):
        shapes = {name: tuple(weight.shape) for name, weight in block.named_parameters()}
        for name, shape in shapes.items():
            there = tensors.get(decoder.name(index, name))
            if there is not None and len(there.shape) == len(shape) and 0 not in there.shape:
                shapes[name] = there.shape
        put_parameters(block, {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})


def _ties(model: PreTrainedModel) -> tuple[str, str] | None:
    """The names of the head's and the embeddings' weights, where the config ties them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.tie_word_embeddings or head is None:
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[head], names[embeddings]
