"""Tensors of a GGUF file, made from those of a checkpoint one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGMLQuantizationType, TensorNameMap
from torch import Tensor

from optprune.errors import InputError
from optprune.export.gguf_families import Family
from optprune.models import Decoder
from optprune.models.architecture import BlockShape, rows_of_heads
from optprune.models.checkpoint import Checkpoint, StoredTensor
from optprune.models.skeleton import with_model_names

IDLE_WIDTH = 32
"""width of the MLP of zeros in a block that has none: deci would skip the attention of such a block too"""
BLOCK_OF_Q8 = 32
"""number of values that share a scale in q8_0: rows of other lengths are float16"""
ROUTER = ".mlp.gate.weight"
"""name of the router's matrix, which stays float32 like vectors"""


@dataclass(frozen=True)
class Target:
    """Tensor to write: name in the file, shape, type, and a function that makes it."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors of a model in the layout of a llama.cpp family."""

    decoder: Decoder
    """shapes only"""
    checkpoint: Checkpoint
    family: Family
    names: TensorNameMap
    kind: GGMLQuantizationType
    """type of matrices"""

    def targets(self) -> Iterator[Target]:
        """Yield all tensors in the order of the checkpoint, matrices of experts last."""
        experts, found = dict[str, dict[int, StoredTensor]](), self._stored()
        for name, stored in found.items():
            every, number = self._split_expert(name)
            if every:
                experts.setdefault(every, {})[number] = stored
            else:
                yield self._target(name, stored)
        for name, numbered in experts.items():
            each = [numbered[number] for number in range(len(numbered))]
            shape = (len(each), *each[0].shape)
            yield Target(self._name(name), shape, self._kind(name, shape), partial(_stacked, each))
        embeddings = self._embeddings(found)
        if embeddings is not None:
            yield Target("output.weight", embeddings.shape, self._kind("output", embeddings.shape), embeddings.read)
        for index, own in enumerate(self.decoder.shapes()):
            if not own.mlp_width:
                yield from self._idle(index)

    def _stored(self) -> dict[str, StoredTensor]:
        """Return the stored tensors of the model by their names in it.

        Raises InputError where a tensor is missing, or its shape differs from the config's.
        """
        known = dict(self.decoder.model.named_parameters())
        named = with_model_names(self.decoder.model, self.checkpoint).tensors
        missing = sorted(known.keys() - named.keys())
        if missing:
            raise InputError(f"the weights of {self.checkpoint.source} lack {missing[0]}: fetch them again")
        for name, weight in known.items():
            if named[name].shape != tuple(weight.shape):
                raise InputError(
                    f"{name} of {self.checkpoint.source} is {list(named[name].shape)} in the weights and "
                    f"{list(weight.shape)} by config.json: fetch the folder again"
                )
        # Older files hold masks as well.
        return {name: stored for name, stored in named.items() if name in known}

    def _embeddings(self, found: dict[str, StoredTensor]) -> StoredTensor | None:
        """Return the embeddings where they are also the head and llama.cpp needs a separate head."""
        model = self.decoder.model
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        if self.family.tied or outer is None or inner.weight is not outer.weight:
            return None
        return found[next(name for name, parameter in model.named_parameters() if parameter is inner.weight)]

    def _split_expert(self, name: str) -> tuple[str, int]:
        """Return the common name of an expert's matrix and the expert's number; "" and 0 for other tensors."""
        mixture = self.decoder.architecture.mixture
        before, found, after = name.partition(f".{mixture.experts}.") if mixture else (name, "", "")
        number, _, rest = after.partition(".")
        return (f"{before}{found}{rest}", int(number)) if found else ("", 0)

    def _target(self, name: str, stored: StoredTensor) -> Target:
        path, block = self._path(name)
        shape, make = stored.shape, stored.read
        if block is not None:
            shape, make = self._of_heads(path, self.decoder.shape(block), shape, make)
        if len(shape) == 2 and shape[0] == 1:  # llama.cpp has a vector in place of a gate with one row
            shape, make = shape[1:], _flat(make)
        if self.family.shift and len(shape) == 1:
            make = _shifted(make, self.family.shift)
        return Target(self._name(name), shape, self._kind(name, shape), make)

    def _path(self, name: str) -> tuple[str, int | None]:
        """Return the path of a tensor's layer in its block, and the block; the name and None outside of blocks."""
        blocks = f"{self.decoder.architecture.blocks}."
        if not name.startswith(blocks):
            return name, None
        block, _, own = name.removeprefix(blocks).partition(".")
        return own.rpartition(".")[0], int(block)

    def _of_heads(
        self, path: str, own: BlockShape, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        """Return shape and maker of a tensor, with the rows or columns of heads in llama.cpp's layout."""
        architecture, heads = self.decoder.architecture, self.decoder.heads
        missing = heads.dim - own.value_dim
        if path == architecture.output and missing and own.kv_heads and len(shape) == 2:

            def wider() -> Tensor:
                columns = make().unflatten(1, (-1, own.value_dim))
                return torch.nn.functional.pad(columns, (0, missing)).flatten(1, 2)

            return (shape[0], own.kv_heads * heads.group * heads.dim), wider
        if architecture.joined and path == architecture.value:
            query, key, value = rows_of_heads(architecture.joined, heads, own, torch.device("cpu"))
        elif path == architecture.value and missing:
            query, key = torch.empty(2, own.kv_heads, 0, dtype=torch.int64)
            value = torch.arange(shape[0]).view(own.kv_heads, own.value_dim)
        else:
            turned = self.family.neighbours and path in (architecture.query, architecture.key)
            return shape, _turned(make, shape[0] // heads.dim) if turned else make

        def gathered() -> Tensor:
            tensor = make()
            values = tensor[value]  # [kv_heads, value_dim, ...]
            filled = torch.cat([values, values.new_zeros(own.kv_heads, missing, *tensor.shape[1:])], dim=1)
            return torch.cat([tensor[query.flatten()], tensor[key.flatten()], filled.flatten(0, 1)])

        return (query.numel() + key.numel() + own.kv_heads * heads.dim, *shape[1:]), gathered

    def _idle(self, block: int) -> Iterator[Target]:
        """Yield the tensors of an MLP of zeros."""
        hidden = int(self.decoder.model.config.hidden_size)
        wide = (IDLE_WIDTH, hidden)
        shapes = {"ffn_norm": (hidden,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
        for name, shape in shapes.items():
            yield Target(f"blk.{block}.{name}.weight", shape, self._kind(name, shape), partial(torch.zeros, shape))

    def _name(self, name: str) -> str:
        known = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputError(f"llama.cpp does not support the tensor {name} of {self.checkpoint.source}")
        return known

    def _kind(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        if len(shape) == 1 or name.endswith(ROUTER):
            return GGMLQuantizationType.F32
        too_narrow = self.kind == GGMLQuantizationType.Q8_0 and shape[-1] % BLOCK_OF_Q8
        return GGMLQuantizationType.F16 if too_narrow else self.kind


def _stacked(each: Sequence[StoredTensor]) -> Tensor:
    return torch.stack([stored.read() for stored in each])


def _flat(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: make().flatten()


def _shifted(make: Callable[[], Tensor], by: float) -> Callable[[], Tensor]:
    return lambda: make().float() + by


def _turned(make: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    """Return a maker that interleaves the two halves of each head's rows, since llama.cpp rotates neighbours."""

    def turned() -> Tensor:
        return make().unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    return turned
