"""Kinds of units that a recipe can remove: the layers they prune, how those are linked, and the shape that is left."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor, nn

from optprune.errors import InputError
from optprune.grids import Grid
from optprune.metric import OutputMetric
from optprune.models.architecture import (
    Architecture,
    BlockAllocation,
    BlockShape,
    rows_of_gates,
    rows_of_heads,
)
from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.recurrent import Runs
from optprune.moments import InputMoments
from optprune.patterns import ANYWHERE, Pattern, PatternFamily
from optprune.problems import Channels, LayerLoss, loss_of_rows
from optprune.system.wording import counted
from optprune.work import Work

MULTIPLE = 32
"""the default multiple of counts: blocks of llama.cpp's types q4_0, q5_0 and q8_0 hold 32 numbers, and rows of another
length are stored in a larger type"""
LEAST_MULTIPLE = 8
"""the default multiple of small counts: matrix kernels read 16 bytes at a time"""
NARROW = 512
"""an MLP of fewer units is narrow: rounding by half of 32 would move more than 3 percent of its units"""
WIDE = 4096
"""an MLP of at least so many units is wide"""
WIDE_MULTIPLE = 64
"""the default multiple of a wide MLP: kernels for GPUs read tiles of 64, and rounding by half a tile moves less than 1
percent of its units; in a narrow one it would move several percent, which a budget notices"""
STEPS = 5
"""heads of fewer multiples than this get a smaller default multiple. Where every block loses the same share, they are
not narrowed by whole multiples: a sparsity of 10 percent, FASP's least, would round to no value dimension at all"""


@dataclass(frozen=True)
class Target:
    """A layer to prune in a block, and the place in the forward pass where its input is recorded."""

    path: str
    tap: str
    """the first layer that reads the same input: layers of one stage share one set of moments"""
    kind: "LinkedUnits | None" = None
    """the unit kind of its columns, where units are pruned"""
    family: PatternFamily = ANYWHERE
    """the pattern of its mask, where single weights are pruned"""
    grid: Grid | None = None
    """the grid of its weights, where they are stored in few bits"""

    @property
    def rotated(self) -> bool:
        """Whether its columns are directions, so that it is solved for rotated inputs too."""
        return self.kind is not None and self.kind.rotated

    @property
    def by_rows(self) -> bool:
        """Whether its units are rows, so that its problem is that of the transposed weight."""
        return self.kind is not None and self.kind.by_rows

    def sizes(self, layer: nn.Linear) -> tuple[int, int]:
        """Return the outputs and inputs of the weight in the layer's problem."""
        if self.by_rows:
            return layer.in_features + (layer.bias is not None), layer.out_features
        return layer.out_features, layer.in_features

    def loss(
        self,
        layer: nn.Linear,
        moments: InputMoments,
        damping: float,
        *,
        fit_bias: bool = False,
        metric: OutputMetric | None = None,
    ) -> LayerLoss:
        """Return the loss that the layer's problem minimises: of its transposed weight where units are rows."""
        if self.by_rows:
            return loss_of_rows(layer.weight, layer.bias, moments, damping, metric)
        return LayerLoss.of(layer.weight, moments, damping, fit_bias=fit_bias and layer.bias is not None, metric=metric)

    def read(self, value: Tensor, loss: LayerLoss, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Return the layer's weight, and its bias where that changes, from the answer of its problem."""
        if self.by_rows:
            weight = value.T[:, : layer.in_features]
            return weight, None if layer.bias is None else value[-1]
        if layer.bias is None or not loss.fit_bias:
            return value, None
        change = loss.bias_change(value.to(loss.weight))
        return value, layer.bias.detach().to(change.device) + change

    def keep(self, outputs: int, inputs: int, wanted: BlockAllocation) -> int:
        """Return the number of units or weights that an allocation keeps of the weight [outputs, inputs]."""
        if self.kind is not None:
            return self.kind.total(wanted.shape)
        return self.family.keep(outputs, inputs, wanted.share(self.path))

    def pattern(self, outputs: int, inputs: int, wanted: BlockAllocation) -> Pattern | None:
        """Return the pattern of its weights, or None where units are pruned."""
        return self.family.of(outputs, inputs, wanted.share(self.path)) if self.kind is None else None

    def work(self, outputs: int, inputs: int) -> Work:
        """Return the work of choosing its units beside that of the solver; single weights are chosen by the solver."""
        return Work() if self.kind is None else self.kind.work(outputs, inputs)


class Units(ABC):
    """The granularity of a recipe."""

    name: str
    """the name in recipes"""
    description: str
    """a few words for help texts and tables"""
    objective: str = "linked"
    """the name of the default objective of a recipe"""
    family: PatternFamily | None = None
    """the family of the layers' patterns, where single weights are removed"""
    grid: Grid | None = None
    """the grid of the weights that stay, of all layers whose rows are whole blocks"""
    experts: bool = False
    """whether whole experts are removed"""
    sub_blocks: bool = False
    """whether whole sub-blocks are removed"""

    @property
    @abstractmethod
    def kinds(self) -> "tuple[LinkedUnits, ...]":
        """The kinds of units that are removed, empty if no layer is narrowed; the last one fills up a budget."""

    def work(self, outputs: int, inputs: int) -> Work:
        """Return the work of choosing units in a layer [outputs, inputs]; by default none.

        The solver, and the search for a basis of `rotated` units, declare their own.
        """
        return Work()

    def on_grid(self, grid: Grid) -> "Units":
        """Return the units whose weights that stay are on a grid; themselves where no single weights are removed."""
        return self

    def least_experts(self, decoder: Decoder) -> int:
        """Return the number of experts that a block must keep, 0 where no experts are removed.

        InputError where experts are removed and the model has none, or its router needs all of them.
        """
        return 0

    def within(self, decoder: Decoder, *, coupled: bool = True) -> Self:
        """Return the units that a model allows: coordinates in place of directions where its heads are gated.

        `coupled` says whether a full output metric weighs the outputs; without one a composite leaves out its pairs.
        """
        return self

    @property
    def compete(self) -> bool:
        """Whether there are rival kinds of units, so that a block loses units of the cheapest kind only."""
        return len({kind.rivals for kind in self.kinds}) < len(self.kinds)

    def candidates(self, decoder: Decoder, block: int) -> list[Target]:
        """Return the layers of a block that may be pruned, in the forward order, once for each unit kind."""
        consumers = [(path, kind) for kind in self.kinds for path in kind.consumers(decoder.architecture)]
        return _in_order(decoder, decoder.shape(block), consumers)

    def targets(self, decoder: Decoder, block: int, wanted: BlockAllocation, drifted: bool) -> list[Target]:
        """Return the layers of a block that an allocation prunes, in the order of the forward pass.

        The allocation may narrow units of any kind. Where inputs have `drifted` from the dense model's, all layers with
        units of the recipe's own kinds are corrected, even those that keep every unit.
        """
        before, after = decoder.shape(block), wanted.shape
        changed = [kind for kind in self._every() if kind.there(after) < kind.there(before)]
        changed += [kind for kind in self.kinds if not kind.by_rows] if drifted else []
        # A layer has units of one kind: kinds that the allocation narrows precede those that are only corrected.
        chosen = {path: kind for kind in reversed(changed) for path in kind.consumers(decoder.architecture)}
        return _in_order(decoder, after, chosen.items())

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        """Raise InputError where an allocation asks something of a block that these units cannot do."""
        if wanted.shares:
            raise InputError(f"the allocation removes single weights in block {block}: use a recipe with units weights")
        fewer = wanted.shape.kv_heads and wanted.shape.pairs != decoder.shape(block).pairs
        if fewer and not any(kind.field == "pairs" for kind in self.kinds):
            raise InputError(
                f"the allocation removes pairs of queries and keys in block {block}: use a recipe with units qk or "
                "rotated-all-qk, and a full metric"
            )

    def check_multiple(self, shapes: Sequence[BlockShape], multiple: int | None, *, alike: bool) -> None:
        """Raise InputError where a multiple is requested and no count of these units would be one."""
        having = [(kind, shape) for kind in self.kinds for shape in shapes if kind.there(shape)]
        if multiple is None or any(
            not kind.size * kind.multiple(shape, multiple, alike) % multiple for kind, shape in having
        ):
            return
        counts = sorted({kind.size * kind.there(shape) for kind, shape in having}) or [0]
        there = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        raise InputError(
            f"a width multiple of {multiple} has no effect on units {self.name!r}, of which a block has {there}: "
            "leave out --width-multiple, or give a smaller one"
        )

    def whole_metric(self, architecture: Architecture) -> tuple[str, ...]:
        """Return the layers that get a full output metric, which takes a matrix [outputs, outputs] for each."""
        every = {kind: kind.consumers(architecture) for kind in self._every()}
        # Experts are many: their layers get one only where the recipe removes their units.
        wanted = [paths for kind, paths in every.items() if kind in self.kinds or len(paths) == 1]
        return tuple(dict.fromkeys(path for paths in wanted for path in paths))

    def _every(self) -> "tuple[LinkedUnits, ...]":
        """Return the kinds that an allocation may narrow, the recipe's own first."""
        return tuple(dict.fromkeys((*self.kinds, KvGroups(), Values(), RecurrentHeads(), Mlp())))


class LinkedUnits(Units):
    """Units of one kind: each is some columns of a layer, and the rows of earlier layers that produce these columns.

    A block may have several such layers, one of every expert: all keep equally many units, each layer its own choice.
    """

    field: str
    """the field of a block's shape that counts them, in every slot"""
    part: str
    """the sub-block that is removed when none is left"""
    rotated: bool = False
    """whether they are directions, taken from a rotated basis of each slot, and not coordinates"""
    by_rows: bool = False
    """whether a unit is rows of all of its layers, and not columns of the last one"""
    of_heads: bool = False
    """whether heads get fewer dimensions, of values or of queries and keys"""
    affine: bool = False
    """whether the columns read an affine function of what the rows make, so that zero rows leave them at zero"""
    size: int = 1
    """the dimensions of a head that a unit has, which multiples of counts are multiples of"""

    @property
    def rivals(self) -> str:
        """The name of a group of kinds: a block loses units of one kind of each group. By default the sub-block."""
        return self.part

    @property
    def kinds(self) -> "tuple[LinkedUnits, ...]":
        return (self,)

    def check_possible(self, decoder: Decoder) -> None:
        """Raise InputError where no such unit of a model can be removed."""
        decoder.architecture.check_divisible(
            self.field, f"units {self.name} remove {self.field}", "choose others, such as --units mlp"
        )

    @abstractmethod
    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        """Return the layers whose columns they are: one, or one of every expert."""

    @abstractmethod
    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        """Return how they link one of these layers of a block with earlier layers."""

    def layers(self, decoder: Decoder, block: int) -> tuple[LinkedLayers, ...]:
        """Return the links of all of these layers that a block has."""
        consumers = self.consumers(decoder.architecture)
        return tuple(self.linked(decoder, block, path) for path in decoder.paths(block) if path in consumers)

    def there(self, shape: BlockShape) -> int:
        """Return the number of units that a shape has in every slot."""
        return getattr(shape, self.field)

    def total(self, shape: BlockShape) -> int:
        """Return the number of units that a shape has in all slots of one layer."""
        return self.there(shape)

    def with_count(self, shape: BlockShape, count: int) -> BlockShape:
        """Return the shape with so many units in every slot; zero removes the sub-block."""
        return replace(shape, **{self.field: count}) if count else shape.without(self.part)

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        """Return the number of which a count must be a multiple, unless all units stay.

        `asked` is the recipe's `width_multiple`; `alike` says that every block loses the same share.
        """
        return asked or 1


@final
@dataclass(frozen=True)
class Mlp(LinkedUnits):
    """The hidden units of an MLP, or of every expert: one slot."""

    name = "mlp"
    description = "hidden units of the MLPs, or of every expert"
    field = "mlp_width"
    part = "mlp"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.mlp_consumers

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        self.check_possible(decoder)
        architecture = decoder.architecture
        layer, producers = decoder.layer(block, consumer), architecture.mlps[consumer]
        every = torch.arange(layer.in_features, device=_index_device(layer.weight))
        apart = torch.arange(architecture.rows_of(consumer), device=every.device) * len(every)
        channels, rows = Channels.of(len(every), device=every.device), every[:, None] + apart
        return LinkedLayers(consumer, producers, channels, (rows,) * len(producers))

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        if asked:
            return asked
        if shape.mlp_width >= WIDE:
            return WIDE_MULTIPLE
        return MULTIPLE if shape.mlp_width >= NARROW else LEAST_MULTIPLE


@final
@dataclass(frozen=True)
class Values(LinkedUnits):
    """The value dimensions of the heads: a slot for each KV head, tied over its query heads."""

    rotated: bool = False
    field = "value_dim"
    of_heads = True
    affine = True
    part = "attention"

    @property
    def name(self) -> str:
        return "rotated-vo" if self.rotated else "vo"

    @property
    def description(self) -> str:
        return f"value dimensions of the heads{', as directions of a rotated basis' if self.rotated else ''}"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.output,)

    def within(self, decoder: Decoder, *, coupled: bool = True) -> Self:
        # A gate has a factor for each value dimension, which directions would mix.
        return replace(self, rotated=self.rotated and not decoder.heads.gated)

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        self.check_possible(decoder)
        architecture, group, shape = decoder.architecture, decoder.heads.group, decoder.shape(block)
        dim = shape.value_dim
        device = _index_device(decoder.layer(block, consumer).weight)
        unit = torch.arange(shape.kv_heads * dim, device=device)
        slot = unit // dim
        query_head = slot[:, None] * group + torch.arange(group, device=device)
        *_, rows = rows_of_heads(architecture.joined, decoder.heads, shape, device)
        made = {architecture.value: rows.reshape(-1, 1)}
        if decoder.heads.gated:
            made[architecture.query] = rows_of_gates(decoder.heads, shape, device).flatten(0, 1)
        channels = Channels(query_head * dim + (unit % dim)[:, None], slot)
        return LinkedLayers(consumer, tuple(made), channels, tuple(made.values()))

    def total(self, shape: BlockShape) -> int:
        return shape.value_dim * shape.kv_heads

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        asked = asked or _multiple_of_heads(shape.value_dim)
        coarse = shape.value_dim % asked == 0 and (not alike or shape.value_dim >= STEPS * asked)
        return asked if coarse else 1


def _multiple_of_heads(value_dim: int) -> int:
    """Return the largest of 32, 16 and 8 of which a head has at least `STEPS`; 8 in small heads."""
    fitting = (size for size in (MULTIPLE, MULTIPLE // 2) if value_dim % size == 0 and value_dim >= STEPS * size)
    return next(fitting, LEAST_MULTIPLE)


@final
@dataclass(frozen=True)
class KvGroups(LinkedUnits):
    """The KV heads, each with its query heads: one slot."""

    name = "kv-groups"
    description = "KV heads, each with its query heads"
    field = "kv_heads"
    part = "attention"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.output,)

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        self.check_possible(decoder)
        architecture, heads, shape = decoder.architecture, decoder.heads, decoder.shape(block)
        device = _index_device(decoder.layer(block, consumer).weight)
        width = heads.group * shape.value_dim
        rows = rows_of_heads(architecture.joined, heads, shape, device)
        vectors = dict[str, Tensor]()
        if shape.pairs:
            pairs = torch.arange(shape.kv_heads * shape.pairs, device=device)
            vectors[architecture.kept_pairs] = pairs.view(shape.kv_heads, -1)
        made: dict[str, list[torch.Tensor]] = {}
        for path, own in zip((architecture.query, architecture.key, architecture.value), rows, strict=True):
            made.setdefault(path, []).append(own)  # one layer may make them all
        channels = Channels.of(shape.kv_heads * width, width, device)
        every = tuple(torch.cat(own, 1) for own in made.values())
        queries = torch.arange(shape.kv_heads * heads.group, device=device).reshape(-1, heads.group)
        vectors |= dict.fromkeys(architecture.per_head, queries)
        return LinkedLayers(consumer, tuple(made), channels, every, vectors)

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        return 1


@final
@dataclass(frozen=True)
class Pairs(LinkedUnits):
    """The rotary pairs of queries and keys: a slot for each KV head, whose query heads lose the same pairs.

    A pair is two rows of a key head, which the rotary embedding rotates together, and two of each query head that reads
    it. Without a pair every attention score lacks its term, which the rows of the other pairs can make up for: the
    problem is that of the transposed query layer (`loss_of_rows`).
    """

    every: int = 0
    """the rotary pairs of a head of the dense model; zero until `within` sets it"""
    name = "qk"
    description = "rotary pairs of queries and keys"
    field = "pairs"
    of_heads = True
    part = "attention"
    by_rows = True
    size = 2

    @property
    def rivals(self) -> str:
        return self.field

    def within(self, decoder: Decoder, *, coupled: bool = True) -> Self:
        return replace(self, every=decoder.heads.dim // 2)

    def check_possible(self, decoder: Decoder) -> None:
        architecture = decoder.architecture
        if not architecture.pairs_kept_by_head:
            raise InputError(
                f"units {self.name} remove rotary pairs of queries and keys, but a {architecture.model_type} model "
                "needs whole heads of them: choose others, such as --units all"
            )

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.query,) if architecture.pairs_kept_by_head else ()

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        architecture, heads, shape = decoder.architecture, decoder.heads, decoder.shape(block)
        device, pairs = _index_device(decoder.layer(block, consumer).weight), self.there(shape)
        query, key, _ = rows_of_heads(architecture.joined, heads, shape, device)

        def halves(rows: Tensor) -> Tensor:
            """Return the rows of each pair [kv_heads pairs, n] from those of heads [kv_heads, heads dim]."""
            return rows.unflatten(1, (-1, 2, pairs)).permute(0, 3, 1, 2).reshape(shape.kv_heads * pairs, -1)

        unit = torch.arange(shape.kv_heads * pairs, device=device)
        channels, kept = Channels(halves(query), unit // pairs), {architecture.kept_pairs: unit[:, None]}
        return LinkedLayers(consumer, (architecture.key,), channels, (halves(key),), kept, by_rows=True)

    def there(self, shape: BlockShape) -> int:
        return (shape.pairs or self.every) if shape.kv_heads else 0

    def total(self, shape: BlockShape) -> int:
        return self.there(shape) * shape.kv_heads

    def with_count(self, shape: BlockShape, count: int) -> BlockShape:
        if not count:
            return shape.without(self.part)
        return replace(shape, pairs=0 if count == self.every else count) if shape.kv_heads else shape

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        dim = 2 * self.there(shape)
        asked = asked or _multiple_of_heads(dim)  # dimensions, as for the values of a head
        coarse = asked % 2 == 0 and dim % asked == 0 and (not alike or dim >= STEPS * asked)
        return asked // 2 if coarse else 1


@final
@dataclass(frozen=True)
class RecurrentHeads(LinkedUnits):
    """The heads of recurrent mixers that share nothing with others: one slot."""

    name = "recurrent-heads"
    description = "key heads of delta networks with their value heads, groups of heads of Mamba 2"
    field = "recurrent"
    part = "recurrent"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return () if architecture.recurrent is None else (architecture.recurrent.output,)

    def check_possible(self, decoder: Decoder) -> None:
        super().check_possible(decoder)
        most = max(map(self.there, decoder.shapes()))
        if most < 2:
            having = "one such unit, which goes with its" if most else "no"
            raise InputError(
                f"units {self.name} are {self.description}, but a block of this {decoder.architecture.model_type} "
                f"model has {having} recurrent mixer: choose others, such as --units mlp"
            )

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        super().check_possible(decoder)
        mixer, config, heads = decoder.architecture.recurrent, decoder.model.config, decoder.shape(block).recurrent
        assert mixer is not None
        device, there = decoder.layer(block, consumer).weight.device, dict(decoder.blocks[block].named_parameters())

        def rows_of(runs: Runs) -> torch.Tensor:
            return mixer.rows(config, runs, heads, device)

        channels = Channels(rows_of((mixer.width,)), torch.zeros(heads, dtype=torch.long, device=device))
        vectors = {name: rows_of(runs) for name, runs in mixer.vectors.items() if name in there}
        return LinkedLayers(consumer, tuple(mixer.reads), channels, tuple(map(rows_of, mixer.reads.values())), vectors)

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        return 1


def _in_order(decoder: Decoder, shape: BlockShape, consumers: Iterable[tuple[str, LinkedUnits]]) -> list[Target]:
    """Return the targets among these layers that a block of a shape has."""
    taps, sizes = decoder.architecture.taps, decoder.layer_sizes(shape)
    order = {path: number for number, path in enumerate(sizes)}
    there = [(path, kind) for path, kind in consumers if all(sizes[path])]
    return [Target(path, taps[path], kind) for path, kind in sorted(there, key=lambda pair: order[pair[0]])]


@final
@dataclass(frozen=True)
class Composite(Units):
    """Units of several kinds. Those of one sub-block compete, block by block (`Units.compete`).

    Pairs do not compete with the others. They are left out where the family or the metric does not allow them.
    """

    name: str
    of: tuple[LinkedUnits, ...]
    """the kinds of units; the last one fills up the rest of a budget"""

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return self.of

    @property
    def description(self) -> str:
        return "; ".join(kind.description for kind in self.of)

    def within(self, decoder: Decoder, *, coupled: bool = True) -> Self:
        possible = coupled and decoder.architecture.pairs_kept_by_head
        of = [kind.within(decoder) for kind in self.of if possible or kind.field != "pairs"]
        return replace(self, of=tuple(of))

    def work(self, outputs: int, inputs: int) -> Work:
        return sum((kind.work(outputs, inputs) for kind in self.of), Work())


@final
@dataclass(frozen=True)
class Weights(Units):
    """Single weights of every linear layer."""

    family: PatternFamily = ANYWHERE
    grid: Grid | None = None
    name = "weights"
    description = "single weights of all linear layers, anywhere or in a pattern such as 2:4"
    objective = "sparse"

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()

    def candidates(self, decoder: Decoder, block: int) -> list[Target]:
        taps = decoder.architecture.taps
        return [
            Target(path, taps[path], family=self.family, grid=self._grid(decoder.layer(block, path).in_features))
            for path in decoder.paths(block)
        ]

    def on_grid(self, grid: Grid) -> Units:
        return replace(self, grid=grid)

    def _grid(self, inputs: int) -> Grid | None:
        """Return the grid of rows of so many weights; None where they are not whole blocks."""
        return None if self.grid is None or inputs % self.grid.block else self.grid

    def targets(self, decoder: Decoder, block: int, wanted: BlockAllocation, drifted: bool) -> list[Target]:
        every = self.candidates(decoder, block)
        return [target for target in every if target.grid is not None or wanted.share(target.path) < 1]

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        if wanted.shape.parts and wanted.shape != decoder.shape(block):
            raise InputError(f"the allocation narrows block {block}, but the recipe's units are single weights")
        if not all(map(self.family.admits, wanted.shares.values())):
            raise InputError(
                f"a layer of block {block} keeps another share than the pattern {self.family.name}: use its share, or 1"
            )

    def whole_metric(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.layers


@final
@dataclass(frozen=True)
class Experts(Units):
    """Whole experts, with the rows of the router that choose them; no layer is solved afterwards.

    Every block keeps equally many, at least as many as its router chooses for a token.
    """

    name = "experts"
    description = "whole experts of a mixture"
    experts = True

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()

    def least_experts(self, decoder: Decoder) -> int:
        """Return the number of experts that a router chooses for a token; InputError where there is no router."""
        if decoder.architecture.mixture is None:
            raise InputError(
                f"units {self.name} need a router, and a {decoder.architecture.model_type} model has none: "
                "choose a recipe with other units"
            )
        if not any(shape.experts for shape in decoder.shapes()):
            raise InputError(
                f"units {self.name} need a router, and no block of this {decoder.architecture.model_type} model has "
                "one: choose a recipe with other units"
            )
        mixture, config = decoder.architecture.mixture, decoder.model.config
        groups = (getattr(config, mixture.groups) if mixture.groups else None) or 1
        if groups > 1:
            raise InputError(
                f"units {self.name} would leave groups of other sizes, and the router of this "
                f"{decoder.architecture.model_type} model chooses among {groups} groups of equal size "
                f"({mixture.groups}): choose a recipe with other units"
            )
        return max(decoder.experts_for_a_token, mixture.fewest)

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        super().check(decoder, block, wanted)
        least, kept = self.least_experts(decoder), wanted.shape.experts
        if 0 < kept < least:
            chosen = f"the router chooses {least} for each token"
            reason = chosen if least == decoder.experts_for_a_token else f"the stock router works with {least} or more"
            raise InputError(f"the allocation keeps {counted(kept, 'expert')} in block {block}, where {reason}")


@final
@dataclass(frozen=True)
class Blocks(Units):
    """Whole sub-blocks, attention or MLP; no layer is solved."""

    name = "blocks"
    description = "whole attention and MLP sub-blocks"
    sub_blocks = True

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()


UNITS: dict[str, Units] = {
    units.name: units
    for units in (
        *(Mlp(), Values(), Values(rotated=True), Pairs(), KvGroups(), RecurrentHeads()),
        *(Composite("all", (Values(), Mlp())), Composite("rotated-all", (Values(rotated=True), Mlp()))),
        Composite("rotated-all-qk", (Pairs(), Values(rotated=True), Mlp())),
        *(
            Composite("all-heads", (Values(), KvGroups(), Mlp())),
            Composite("rotated-all-heads", (Values(rotated=True), KvGroups(), Mlp())),
            Composite("all-recurrent", (Values(), RecurrentHeads(), Mlp())),
        ),
        *(Weights(), Experts(), Blocks()),
    )
}
"""the units of a recipe, by name"""


def unit_kinds() -> dict[str, str]:
    """Return every kind of units that a recipe can name, with a few words about it, for help texts and tables."""
    return {name: units.description for name, units in UNITS.items()}


def _index_device(weight: Tensor) -> torch.device:
    """Return the device for the indices of a layer's units: the CPU where its weight is still in the model's files."""
    return torch.device("cpu") if weight.is_meta else weight.device


def reorderable(decoder: Decoder, block: int, path: str, size: int) -> LinkedLayers | None:
    """Return the units that are a layer's inputs, if they can be permuted into whole groups of a `size`, or None.

    Inputs can stand in another order where other layers of the block make them: MLP units (of experts too) and the
    value dimensions of a KV head. None where a layer has no such inputs, where a head does not hold whole groups, and
    where the architecture says that they are indivisible.
    """
    architecture = decoder.architecture
    for kind, paths in ((Values(), (architecture.output,)), (Mlp(), architecture.mlps)):
        if path in paths and kind.field not in architecture.indivisible:
            linked = kind.linked(decoder, block, path)
            return linked if linked.channels.units // linked.channels.slot_count % size == 0 else None
    return None
