"""Tensors of a GGUF file, made from those of a checkpoint one at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import gguf
import torch
from gguf import GGMLQuantizationType, TensorNameMap
from torch import Tensor

from optprune.errors import InputError
from optprune.export.gguf_families import Family
from optprune.export.gguf_types import SMALL_BLOCK, Choice, FileType
from optprune.models import Decoder
from optprune.models.architecture import GATED, BlockShape, rows_of_heads
from optprune.models.checkpoint import Checkpoint, InFiles
from optprune.models.mixture import FUSED
from optprune.models.recurrent import Recurrent, Runs
from optprune.models.skeleton import with_model_names

IDLE_WIDTH = 32
"""width of the MLP of zeros in a block that has none: deci would skip the attention of such a block too"""
Arrangement = Callable[[Tensor], Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


@dataclass(frozen=True)
class Target:
    """Tensor to write: name in the file, shape, type, and the tensors of the model that it is made from."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, InFiles], ...]
    """the model's tensors by name: one, or that of each expert; none for a tensor of zeros"""
    columns: Arrangement = unchanged
    """arrangement of the last dimension, which also holds for the importance of the columns"""
    rows: Arrangement = unchanged
    """arrangement of the other dimensions, made after that of the columns"""
    factor: Tensor | None = None
    """what the model's tensor is multiplied by: one number, or one for each row [rows, 1]; None for nothing"""
    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    computed: Callable[[], Tensor] | None = None
    """function that returns a tensor which is not in the model"""
    turned: bool = False
    """whether its columns are rows of the model's tensor, which have no importance"""

    def arranged(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensor of the file from those of the model, or from others of their shapes."""
        if not tensors:
            return torch.zeros(self.shape)
        parts = [self.rows(self.columns(tensor)) for tensor in tensors]
        return parts[0] if len(self.shape) == parts[0].ndim else torch.stack(parts).reshape(self.shape)

    def make(self) -> Tensor:
        """Return the tensor of the file."""
        if self.computed:
            return self.computed()
        tensors = [stored.read() for _, stored in self.sources]
        return self.arranged(tensors if self.factor is None else [each.float() * self.factor for each in tensors])

    def importance(self, squares: Mapping[str, Tensor]) -> Tensor | None:
        """Return the importance of the columns [columns], or [experts, columns]; None where a layer has none.

        `squares` are the mean squares of the inputs of layers, by the layers' names.
        """
        layers = [name.removesuffix(".weight") for name, _ in self.sources]
        if self.turned or len(self.shape) < 2 or not layers or not all(layer in squares for layer in layers):
            return None
        every = [self.columns(squares[layer][None])[0] for layer in layers]
        # Layers of an expert that are one in the file read the same input.
        united = max(1, len(every) // self.shape[0])
        return every[0] if len(self.shape) == 2 else torch.stack(every[::united])

    @property
    def bytes(self) -> int:
        """The size in the file."""
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors of a model in the layout of a llama.cpp family."""

    decoder: Decoder
    """shapes only"""
    checkpoint: Checkpoint
    family: Family
    names: TensorNameMap
    file: FileType
    importance: bool = False
    """whether there is an importance matrix, by which llama.cpp chooses types too"""
    fill: int = 1
    """the number of which MLP widths are made a multiple, by hidden units of zeros"""

    def filled(self) -> "Tensors":
        """Return these tensors with MLPs filled up so that quantised rows are whole blocks, in the smaller file.

        Rows of whole blocks of 32 numbers have a type of llama.cpp. Rows of whole blocks of 256, which q4_K, q5_K and
        q6_K hold, are longer, but other rows fall back to larger types.
        """
        if not self.file.quantised:
            return self
        ways = [replace(self, fill=fill) for fill in dict.fromkeys((SMALL_BLOCK, self.file.block))]
        return min(ways, key=lambda way: sum(target.bytes for target in way.targets()))

    def width(self, width: int) -> int:
        """Return the width of an MLP in the file."""
        return -(-width // self.fill) * self.fill

    def width_of_shared(self) -> int:
        """Return the width in the file of an expert that every token goes through; a multiple of an expert's stays one.

        llama.cpp takes it to be so many times as wide as the others.
        """
        config, mixture = self.decoder.model.config, self.decoder.architecture.mixture
        assert mixture is not None
        own = mixture.width_of_shared(config)
        count = int(getattr(config, mixture.shared_count)) if mixture.shared_count else 1
        return count * self.width(own // count)

    @cached_property
    def value_dim(self) -> int:
        """The value dimensions of every head in the file."""
        if self.decoder.architecture.latent is None:
            return self.decoder.heads.dim
        return max(shape.value_dim for shape in self.decoder.shapes())

    def missing(self, own: BlockShape) -> int:
        """Return the value dimensions of a head that are zeros in the file, for a block of a shape with attention."""
        return 0 if self.decoder.heads.by_block else self.value_dim - own.value_dim

    def targets(self) -> list[Target]:
        """Return all tensors in the order of the checkpoint, matrices of experts last."""
        found, heads = list(self._untyped()), self.decoder.heads
        shapes = {target.name: target.shape for target in found}
        blocks = self.decoder.shapes()
        choice = Choice(
            self.file, shapes, len(blocks), max(block.experts for block in blocks), heads.group > 1, self.importance
        )
        kinds = choice.kinds()
        return [replace(target, kind=kinds[target.name]) for target in found]

    def _untyped(self) -> Iterator[Target]:
        """Yield all tensors, without their types."""
        experts, found = dict[str, dict[int, list[Target]]](), self._stored()
        for name, stored in found.items():
            every, number = self._split_expert(name)
            if every:
                every = self._united(every)
                own = experts.setdefault(every, {}).setdefault(number, [])
                own.append(self._target(name, stored, self._name(every)))
            else:
                yield from self._targets(name, stored)
        for numbered in experts.values():
            each = [one for number in range(len(numbered)) for one in numbered[number]]
            sources = tuple(source for one in each for source in one.sources)
            rows, *columns = each[0].shape
            shape = (len(numbered), rows * len(each) // len(numbered), *columns)
            yield replace(each[0], shape=shape, sources=sources)
        embeddings = self._embeddings(found)
        if embeddings is not None:
            name, stored = embeddings
            yield Target("output.weight", stored.shape, ((name, stored),), factor=self._factor("lm_head.weight"))
        for index, own in enumerate(self.decoder.shapes()):
            if not own.mlp_width and not self.family.single:
                yield from self._idle(index)

    def _stored(self) -> dict[str, InFiles]:
        """Return the stored tensors of the model by their names in it.

        Raises InputError where a tensor is missing, or its shape differs from the config's.
        """
        known = dict(self.decoder.model.named_parameters())
        named = self._named
        missing = sorted(known.keys() - named.keys())
        if missing:
            raise InputError(f"the weights of {self.checkpoint.source} lack {missing[0]}: fetch them again")
        for name, weight in known.items():
            if named[name].shape != tuple(weight.shape):
                raise InputError(
                    f"{name} of {self.checkpoint.source} is {list(named[name].shape)} in the weights and "
                    f"{list(weight.shape)} by config.json: fetch the folder again"
                )
        # Older files hold masks as well. The kept pairs say where the rows of queries and keys go.
        return {
            name: named[name]
            for name in named
            if name in known and not name.endswith(f".{self.decoder.architecture.kept_pairs}")
        }

    @cached_property
    def _named(self) -> Mapping[str, InFiles]:
        """The stored tensors by their names in the model."""
        return with_model_names(self.decoder.model, self.checkpoint).tensors

    def _embeddings(self, found: dict[str, InFiles]) -> tuple[str, InFiles] | None:
        """Return the embeddings, by name, where they are also the head and llama.cpp needs a separate head."""
        model = self.decoder.model
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        if self.family.tied or outer is None or inner.weight is not outer.weight:
            return None
        name = next(name for name, parameter in model.named_parameters() if parameter is inner.weight)
        return name, found[name]

    def _split_expert(self, name: str) -> tuple[str, int]:
        """Return the common name of an expert's matrix and the expert's number; "" and 0 for other tensors."""
        mixture = self.decoder.architecture.mixture
        before, found, after = name.partition(f".{mixture.experts}.") if mixture else (name, "", "")
        number, _, rest = after.partition(".")
        return (f"{before}{found}{rest}", int(number)) if found else ("", 0)

    def _united(self, every: str) -> str:
        """Return the common name of an expert's matrix, which may be that of two of its layers."""
        layer = every.split(".")[-2]
        return every.replace(f".{layer}.", f".{FUSED}.") if self.family.fused and layer in GATED[:2] else every

    def _targets(self, name: str, stored: InFiles) -> Iterator[Target]:
        """Yield the tensors of the file from one of the model, which are two where llama.cpp has two layers of one."""
        architecture, (path, block) = self.decoder.architecture, self._path(name)
        if path in self.family.halves:
            for half, known_as in enumerate(self.family.halves[path]):
                yield self._half(half, stored, self._name(name.replace(path, known_as)), name)
        elif block is not None and path in self.family.parted:
            yield from self._parts(name, stored, path, self.decoder.shape(block))
        elif block is None or architecture.latent is None or path != architecture.value:
            yield self._target(name, stored, self._name(name))
        else:
            yield from self._keys_and_values(name, stored, self.decoder.shape(block))

    def _half(self, half: int, stored: InFiles, known_as: str, name: str) -> Target:
        """Return one half of the rows of a layer that makes both factors of the hidden units."""
        width, hidden = stored.shape[0] // 2, stored.shape[1]
        filled = self.width(width)

        def rows(matrix: Tensor) -> Tensor:
            return torch.nn.functional.pad(matrix.unflatten(0, (2, width))[half], (0, 0, 0, filled - width))

        return Target(known_as, (filled, hidden), ((name, stored),), rows=rows)

    def _parts(self, name: str, stored: InFiles, path: str, own: BlockShape) -> Iterator[Target]:
        """Yield the layers that llama.cpp has in place of one of a recurrent mixer, in which head follows head."""
        config, parts = self.decoder.model.config, self.family.parted[path]
        rows = torch.arange(stored.shape[0]).view(own.recurrent, -1)
        every = sum(run(config) for runs in parts.values() for run in runs)
        widths = [run(config) * rows.shape[1] // every for runs in parts.values() for run in runs]
        columns = iter(rows.split(widths, dim=1))
        for known_as, runs in parts.items():
            chosen = torch.cat([next(columns).flatten() for _ in runs])
            shape = (len(chosen), stored.shape[1])
            there = self._name(name.replace(path, known_as))
            yield Target(there, shape, ((name, stored),), rows=_chosen(chosen))

    def _keys_and_values(self, name: str, stored: InFiles, own: BlockShape) -> Iterator[Target]:
        """Yield the keys and the values that one layer makes of a low-rank vector, head by head."""
        architecture, sources = self.decoder.architecture, ((name, stored),)
        _, key, value = rows_of_heads(architecture.joined, self.decoder.heads, own, torch.device("cpu"))
        both, rank, missing = self._name(name), stored.shape[1], self.missing(own)
        # llama.cpp multiplies the queries by the keys' matrix, and takes the low-rank vectors for its keys.
        yield Target(
            both.replace("_kv_", "_k_"),
            (len(key), rank, key.shape[1]),
            sources,
            rows=lambda matrix: matrix[key].transpose(1, 2),
            turned=True,
        )
        yield Target(
            both.replace("_kv_", "_v_"),
            (len(value), self.value_dim, rank),
            sources,
            rows=lambda matrix: torch.nn.functional.pad(matrix[value], (0, 0, 0, missing)),
        )

    def _target(self, name: str, stored: InFiles, known_as: str) -> Target:
        path, block = self._path(name)
        target = Target(known_as, stored.shape, ((name, stored),))
        if block is not None:
            target = self._of_pairs(path, block, target)
            target = self._of_mlp(path, self._of_heads(path, self.decoder.shape(block), target))
            target = self._of_states(name, self.decoder.shape(block), target)
        if len(target.shape) == 3:  # a convolution of each channel for itself
            target = replace(target, shape=(target.shape[0], target.shape[2]), rows=_then(target.rows, _channels))
        if len(target.shape) == 2 and target.shape[0] == 1:  # llama.cpp has a vector in place of a gate with one row
            target = replace(target, shape=target.shape[1:], rows=torch.flatten)
        if self.family.shift and name.endswith("norm.weight") and not self._of_mixer(name):
            target = replace(target, rows=_then(target.rows, _shifted(self.family.shift)))
        return replace(target, factor=self._factor(path))

    def _factor(self, path: str) -> Tensor | None:
        """Return the factor that is multiplied into the weights of a layer, because llama.cpp does not apply it."""
        config, mixer = self.decoder.model.config, self.decoder.architecture.recurrent
        factors = self.family.factors(config).get(path, ())
        if len(factors) < 2:
            return torch.tensor(factors) if factors else None
        runs = mixer.reads[path] if mixer else ()
        return torch.tensor(factors).repeat_interleave(torch.tensor([run(config) for run in runs]))[:, None]

    def _of_mixer(self, name: str) -> bool:
        """Return whether a tensor is of a recurrent mixer."""
        mixer = self.decoder.architecture.recurrent
        return mixer is not None and f".{mixer.module}." in name

    def _path(self, name: str) -> tuple[str, int | None]:
        """Return the path of a tensor's layer in its block, and the block; the name and None outside of blocks."""
        blocks = f"{self.decoder.architecture.blocks}."
        if not name.startswith(blocks):
            return name, None
        block, _, own = name.removeprefix(blocks).partition(".")
        return own.rpartition(".")[0], int(block)

    def _of_mlp(self, path: str, target: Target) -> Target:
        """Return a tensor with the hidden units of zeros that fill up its MLP: the MLP gives the same output.

        The columns of the last layer are zeros, and so are the rows and biases of the layers before it.
        """
        architecture, shape = self.decoder.architecture, target.shape
        if path in architecture.mlps and len(shape) == 2:
            missing = self._width_of(path, shape[1]) - shape[1]
            columns = _padded(missing) if missing else target.columns
            return replace(target, shape=(shape[0], shape[1] + missing), columns=columns)
        if not any(path in producers for producers in architecture.mlps.values()):
            return target
        parts = architecture.rows_of_unit
        width = shape[0] // parts
        missing = self._width_of(path, width) - width
        rows = _with_rows(parts, missing) if missing else target.rows
        return replace(target, shape=(parts * (width + missing), *shape[1:]), rows=rows)

    def _width_of(self, path: str, width: int) -> int:
        """Return the width in the file of the MLP that a layer is of."""
        mixture = self.decoder.architecture.mixture
        shared = mixture is not None and mixture.shared and path.startswith(f"{mixture.shared}.")
        return self.width_of_shared() if shared else self.width(width)

    def _of_states(self, name: str, own: BlockShape, target: Target) -> Target:
        """Return a tensor of a recurrent mixer in llama.cpp's layout: the decays themselves, and the norm by groups."""
        mixer, kind = self.decoder.architecture.recurrent, name.rpartition(".")[2]
        if mixer is None or not self._of_mixer(name):
            return target
        scanned = f"{mixer.module}.D" in mixer.vectors  # as a Mamba 2 is, for which numbers of a head are a column
        if kind == "A_log":
            target = replace(target, rows=_decays)
        if self.family.tiled:
            target = self._of_value_heads(name, own, mixer, target)
        if kind in ("A_log", "D") and scanned:
            return replace(target, shape=(*target.shape, 1), rows=_then(target.rows, _column))
        if not scanned or not name.endswith(f".{mixer.module}.norm.weight"):
            return target
        return replace(target, shape=(own.recurrent, target.shape[0] // own.recurrent), rows=_in_groups(own.recurrent))

    def _of_value_heads(self, name: str, own: BlockShape, mixer: Recurrent, target: Target) -> Target:
        """Return a tensor of a recurrent mixer with its value heads in llama.cpp's order."""
        path, place = self._path(name)[0], name.index(f".{mixer.module}.") + 1
        if path == mixer.output:
            return replace(target, columns=_chosen_columns(self._in_order((mixer.width,), own, mixer)))
        runs = mixer.reads.get(path) or mixer.vectors.get(name[place:])
        return replace(target, rows=_then(target.rows, _chosen(self._in_order(runs, own, mixer)))) if runs else target

    def _in_order(self, runs: Runs, own: BlockShape, mixer: Recurrent) -> Tensor:
        """Return the rows of runs of a block's recurrent mixer, those of value heads in llama.cpp's order."""
        config, found, first = self.decoder.model.config, list[Tensor](), 0
        for run in runs:
            rows = torch.arange(run(config) * own.recurrent // mixer.heads(config)) + first
            first += len(rows)
            if run in self.family.tiled:
                rows = rows.view(own.recurrent, -1, self.family.tiled[run](config)).transpose(0, 1).flatten()
            found.append(rows)
        return torch.cat(found)

    def _of_pairs(self, path: str, block: int, target: Target) -> Target:
        """Return a tensor with rows of zeros for the rotary pairs that the heads of queries and keys lack."""
        architecture, heads, shape = self.decoder.architecture, self.decoder.heads, target.shape
        if path not in (architecture.query, architecture.key) or not self.decoder.shape(block).pairs:
            return target
        pairs = self._named[self.decoder.name(block, architecture.kept_pairs)].read()
        if path == architecture.query:
            pairs = pairs.repeat_interleave(heads.group, dim=0)
        first = heads.dim * torch.arange(len(pairs))[:, None] + pairs
        places, count = torch.cat([first, first + heads.dim // 2], dim=1).flatten(), heads.dim * len(pairs)

        def spread(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(count, *tensor.shape[1:]).index_copy(0, places, tensor)

        return replace(target, shape=(count, *shape[1:]), rows=spread)

    def _of_heads(self, path: str, own: BlockShape, target: Target) -> Target:
        """Return a tensor with the rows or columns of heads in llama.cpp's layout."""
        architecture, heads, shape = self.decoder.architecture, self.decoder.heads, target.shape
        missing = self.missing(own)
        if path == architecture.output and missing and own.kv_heads and len(shape) == 2:

            def wider(tensor: Tensor) -> Tensor:
                columns = tensor.unflatten(1, (-1, own.value_dim))
                return torch.nn.functional.pad(columns, (0, missing)).flatten(1, 2)

            return replace(target, shape=(shape[0], own.kv_heads * heads.group * self.value_dim), columns=wider)
        if path == architecture.query and heads.gated and missing:
            count = own.kv_heads * heads.group
            return replace(target, shape=(2 * count * heads.dim, *shape[1:]), rows=_with_rows(count, missing))
        if architecture.latent is not None:
            return target
        if architecture.joined and path == architecture.value:
            query, key, value = rows_of_heads(architecture.joined, heads, own, torch.device("cpu"))
        elif path == architecture.value and missing:
            query, key = torch.empty(2, own.kv_heads, 0, dtype=torch.int64)
            value = torch.arange(shape[0]).view(own.kv_heads, own.value_dim)
        else:
            turned = self.family.neighbours and path in (architecture.query, architecture.key)
            return replace(target, rows=_then(target.rows, _turned(shape[0] // heads.dim))) if turned else target

        def gathered(tensor: Tensor) -> Tensor:
            values = tensor[value]  # [kv_heads, value_dim, ...]
            filled = torch.cat([values, values.new_zeros(own.kv_heads, missing, *tensor.shape[1:])], dim=1)
            return torch.cat([tensor[query.flatten()], tensor[key.flatten()], filled.flatten(0, 1)])

        count = query.numel() + key.numel() + own.kv_heads * heads.dim
        return replace(target, shape=(count, *shape[1:]), rows=gathered)

    def _idle(self, block: int) -> Iterator[Target]:
        """Yield the tensors of an MLP of zeros."""
        hidden = int(self.decoder.model.config.hidden_size)
        width = self.width(IDLE_WIDTH)
        wide = (width, hidden)
        shapes = {"ffn_norm": (hidden,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
        if gguf.MODEL_TENSOR.FFN_POST_NORM in gguf.MODEL_TENSORS[self.family.known_as]:
            shapes["post_ffw_norm"] = (hidden,)
        for name, shape in shapes.items():
            yield Target(f"blk.{block}.{name}.weight", shape, ())

    def _name(self, name: str) -> str:
        architecture, there = self.decoder.architecture, name
        mixture = architecture.mixture
        if mixture is not None and mixture.correction and name.endswith(f".{mixture.correction}"):
            there = f"{name.removesuffix('_bias')}.bias"
        if name.endswith(tuple(f".{own}" for own in (*architecture.per_head, *architecture.buffers))):
            there = f"{name}.weight"
        known = self.names.get_name(self.family.spelled(there), try_suffixes=(".weight", ".bias", ".scale"))
        if known is None:
            raise InputError(f"llama.cpp does not support the tensor {name} of {self.checkpoint.source}")
        return known


def _column(numbers: Tensor) -> Tensor:
    return numbers[:, None]


def _decays(logarithms: Tensor) -> Tensor:
    return -logarithms.float().exp()


def _then(first: Arrangement, second: Arrangement) -> Arrangement:
    return lambda tensor: second(first(tensor))


def _chosen(rows: Tensor) -> Arrangement:
    return lambda tensor: tensor[rows]


def _chosen_columns(columns: Tensor) -> Arrangement:
    return lambda tensor: tensor[:, columns]


def _in_groups(groups: int) -> Arrangement:
    return lambda gains: gains.unflatten(0, (groups, -1))


def _channels(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _shifted(by: float) -> Arrangement:
    return lambda tensor: tensor.float() + by


def _padded(missing: int) -> Arrangement:
    return lambda tensor: torch.nn.functional.pad(tensor, (0, missing))


def _with_rows(parts: int, missing: int) -> Arrangement:
    """Return an arrangement that adds rows of zeros to each of so many parts, such as the gate and the other rows."""

    def filled(tensor: Tensor) -> Tensor:
        apart = tensor.unflatten(0, (parts, -1))
        zeros = apart.new_zeros(parts, missing, *tensor.shape[1:])
        return torch.cat([apart, zeros], dim=1).flatten(0, 1)

    return filled


def _turned(count: int) -> Arrangement:
    """Return an arrangement that interleaves the two halves of each head's rows: llama.cpp rotates neighbours."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    return turned
