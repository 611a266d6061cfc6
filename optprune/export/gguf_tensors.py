"""The tensors of a GGUF file, made of those of a checkpoint when their turn comes."""

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
from optprune.models.skeleton import named_as_in

IDLE_WIDTH = 32
"""the width of the MLP of zeros in a block that has none: under deci such a block would lose its attention, too"""
BLOCK_OF_Q8 = 32
"""how many numbers share a scale in q8_0: rows of another length are float16"""
ROUTER = ".mlp.gate.weight"
"""the matrix that routes tokens: like vectors it stays float32"""


@dataclass(frozen=True)
class Target:
    """A tensor to come: its name in the file, its shape and type, and how it is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of a model as a family of llama.cpp has them."""

    decoder: Decoder
    """shapes only"""
    checkpoint: Checkpoint
    family: Family
    names: TensorNameMap
    kind: GGMLQuantizationType
    """the type of matrices"""

    def targets(self) -> Iterator[Target]:
        """Them all, in the order of the checkpoint; matrices of experts behind the others."""
        experts, found = dict[str, dict[int, StoredTensor]](), self._stored()
        for name, stored in found.items():
            every, number = self._of_every_expert(name)
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
        """Return what the checkpoint has of the model, by the names in it.

        Raises InputError where something is missing, or has another shape than the config says.
        """
        known = dict(self.decoder.model.named_parameters())
        named = named_as_in(self.decoder.model, self.checkpoint).tensors
        missing = sorted(known.keys() - named.keys())
        if missing:
            raise InputError(f"{missing[0]} is not among the weights of {self.checkpoint.source}: fetch them again")
        for name, weight in known.items():
            if named[name].shape != tuple(weight.shape):
                raise InputError(
                    f"{name} of {self.checkpoint.source} is {list(named[name].shape)} in the weights and "
                    f"{list(weight.shape)} by config.json: fetch the folder again"
                )
        # Older files hold masks besides.
        return {name: stored for name, stored in named.items() if name in known}

    def _embeddings(self, found: dict[str, StoredTensor]) -> StoredTensor | None:
        """The embeddings where they are the head, and llama.cpp wants a head of its own."""
        model = self.decoder.model
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        if self.family.tied or outer is None or inner.weight is not outer.weight:
            return None
        return found[next(name for name, parameter in model.named_parameters() if parameter is inner.weight)]

    def _of_every_expert(self, name: str) -> tuple[str, int]:
        """What the matrix of an expert is called with those of all, and whose it is; "" where it is no expert's."""
        mixture = self.decoder.architecture.mixture
        before, found, after = name.partition(f".{mixture.experts}.") if mixture else (name, "", "")
        number, _, rest = after.partition(".")
        return (f"{before}{found}{rest}", int(number)) if found else ("", 0)

    def _target(self, name: str, stored: StoredTensor) -> Target:
        path, block = self._path(name)
        shape, make = stored.shape, stored.read
        if block is not None:
            shape, make = self._of_heads(path, self.decoder.shape(block), shape, make)
        if len(shape) == 2 and shape[0] == 1:  # a gate of one row is a vector there
            shape, make = shape[1:], _flat(make)
        if self.family.shift and len(shape) == 1:
            make = _shifted(make, self.family.shift)
        return Target(self._name(name), shape, self._kind(name, shape), make)

    def _path(self, name: str) -> tuple[str, int | None]:
        """A tensor's layer, by its path in the block, and the block; the whole name and None outside of blocks."""
        blocks = f"{self.decoder.architecture.blocks}."
        if not name.startswith(blocks):
            return name, None
        block, _, own = name.removeprefix(blocks).partition(".")
        return own.rpartition(".")[0], int(block)

    def _of_heads(
        self, path: str, own: BlockShape, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        """A layer of queries, keys or values with its rows as llama.cpp has them; an output layer with its columns."""
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
        """The tensors of an MLP that adds nothing."""
        hidden = int(self.decoder.model.config.hidden_size)
        wide = (IDLE_WIDTH, hidden)
        shapes = {"ffn_norm": (hidden,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
        for name, shape in shapes.items():
            yield Target(f"blk.{block}.{name}.weight", shape, self._kind(name, shape), partial(torch.zeros, shape))

    def _name(self, name: str) -> str:
        known = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputError(f"llama.cpp has no place for the tensor {name} of {self.checkpoint.source}")
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
    """Rows of so many heads, in which the two halves of each head alternate, as llama.cpp rotates neighbours."""

    def turned() -> Tensor:
        return make().unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    return turned
