"""Units: what a recipe removes. They say which layers that prunes, how those are linked, what a shape has left."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch

from optprune.errors import InputError
from optprune.models.architecture import Architecture, BlockAllocation, BlockShape
from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.rows import rows_of_heads
from optprune.patterns import ANYWHERE, Pattern, PatternFamily
from optprune.problems import Link

MULTIPLE = 8
"""what counts are multiples of where a recipe does not say: matrix kernels are slower on other sizes"""
WIDE = 4096
"""an MLP of so many units is wide"""
WIDE_MULTIPLE = 64
"""the multiple of a wide MLP where a recipe does not say: kernels for GPUs read tiles of 64, and to round to half of
those moves less than 1 percent of its units; of a narrow one it would be several percent, which a budget notices"""
STEPS = 5
"""where the same share goes from every block, only a head of so many multiples is narrowed by whole multiples: in a
smaller one a sparsity of 10 percent, FASP's least, would round to no value dimension at all"""


@dataclass(frozen=True)
class Target:
    """A layer to prune in a block, and the place in the forward pass where its input is seen."""

    path: str
    tap: str
    """the first layer that reads the same input: layers of one stage share one set of moments"""
    kind: "LinkedUnits | None" = None
    """the units that its columns are, where units are pruned"""
    family: PatternFamily = ANYWHERE
    """the pattern that its mask is to have, where single weights are pruned"""

    @property
    def rotated(self) -> bool:
        """Whether its columns are directions, so that it is solved for rotated inputs too."""
        return self.kind is not None and self.kind.rotated

    def keep(self, outputs: int, inputs: int, wanted: BlockAllocation) -> int:
        """How many units or weights an allocation leaves of the layer, whose weight is [outputs, inputs]."""
        if self.kind is not None:
            return self.kind.total(wanted.shape)
        return self.family.keep(outputs, inputs, wanted.share(self.path))

    def pattern(self, outputs: int, inputs: int, wanted: BlockAllocation) -> Pattern | None:
        """The pattern of its weights, or None where units are pruned."""
        return self.family.of(outputs, inputs, wanted.share(self.path)) if self.kind is None else None


class Units(ABC):
    """The granularity of a recipe."""

    name: str
    """the name that a recipe spells"""
    objective: str = "linked"
    """the name of the objective of a recipe that has none of its own"""
    family: PatternFamily | None = None
    """the family of the layers' patterns, where single weights go"""

    @property
    @abstractmethod
    def kinds(self) -> "tuple[LinkedUnits, ...]":
        """The kinds of units that are removed, the last one to fill up a budget; none where no layer is narrowed."""

    @property
    def compete(self) -> bool:
        """Whether a sub-block has units of several kinds: by what they cost a block is narrowed in one of them then."""
        return len({kind.part for kind in self.kinds}) < len(self.kinds)

    def candidates(self, decoder: Decoder, block: int) -> list[Target]:
        """The layers of a block that may be pruned, in the order of the forward pass, once for each kind of units."""
        consumers = [(path, kind) for kind in self.kinds for path in kind.consumers(decoder.architecture)]
        return _in_order(decoder, decoder.shape(block), consumers)

    def targets(self, decoder: Decoder, block: int, wanted: BlockAllocation, drifted: bool) -> list[Target]:
        """The layers of a block that an allocation prunes, in the order of the forward pass, whoever chose it.

        Where inputs have `drifted` from those that a layer is to answer for, all of these units are corrected, even
        those of which all stay.
        """
        before, after = decoder.shape(block), wanted.shape
        changed = [kind for kind in self._every() if kind.there(after) < kind.there(before)]
        changed += self.kinds if drifted else ()
        # A layer has units of one kind: those that an allocation removes come before those that are only corrected.
        chosen = {path: kind for kind in reversed(changed) for path in kind.consumers(decoder.architecture)}
        return _in_order(decoder, after, chosen.items())

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        """Raise InputError when an allocation asks of a block what these units cannot do."""
        if wanted.shares:
            raise InputError(
                f"the allocation thins out layers of block {block}: that needs a recipe with units weights"
            )

    def whole_metric(self, architecture: Architecture) -> tuple[str, ...]:
        """The layers that want a whole output metric: units are columns of few, and a matrix for each is dear."""
        every = {kind: kind.consumers(architecture) for kind in self._every()}
        # Those of experts are many: they have one where the recipe itself removes their units.
        wanted = [paths for kind, paths in every.items() if kind in self.kinds or len(paths) == 1]
        return tuple(dict.fromkeys(path for paths in wanted for path in paths))

    def _every(self) -> "tuple[LinkedUnits, ...]":
        """What an allocation may narrow, whoever chose it: the recipe's own units first."""
        return tuple(dict.fromkeys((*self.kinds, KvGroups(), Values(), Mlp())))


class LinkedUnits(Units):
    """Units of one kind: each is some columns of a layer, and the rows of the layers before it that make those.

    A block may have several such layers, one of every expert, which all keep equally many units, each its own.
    """

    field: str
    """the field of a block's shape that counts them, in every slot"""
    part: str
    """the sub-block that is gone without any of them"""
    rotated: bool = False
    """whether they are directions, taken from a rotated basis of each slot, and not coordinates"""

    @property
    def kinds(self) -> "tuple[LinkedUnits, ...]":
        return (self,)

    @abstractmethod
    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        """The layers whose columns they are: one, or one of every expert."""

    @abstractmethod
    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        """How they link one of these layers of a block with those before it."""

    def layers(self, decoder: Decoder, block: int) -> tuple[LinkedLayers, ...]:
        """How they link the layers of a block, for each of these layers that it has."""
        there = self.consumers(decoder.architecture)
        return tuple(self.linked(decoder, block, path) for path in decoder.paths(block) if path in there)

    def there(self, shape: BlockShape) -> int:
        """How many a shape has in every slot."""
        return getattr(shape, self.field)

    def total(self, shape: BlockShape) -> int:
        """How many a shape has in all slots of one layer."""
        return self.there(shape)

    def with_count(self, shape: BlockShape, count: int) -> BlockShape:
        """The shape with so many in every slot; with none the sub-block is gone."""
        return replace(shape, **{self.field: count}) if count else shape.without(self.part)

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        """What a count is a multiple of, unless all stay, where a recipe asks for multiples, or leaves them open.

        `alike` where the same share is to go from every block.
        """
        return asked or 1


@final
@dataclass(frozen=True)
class Mlp(LinkedUnits):
    """The hidden neurons of an MLP, or of every expert: one slot."""

    name = "mlp"
    field = "mlp_width"
    part = "mlp"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.mlp_consumers

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        architecture = decoder.architecture
        architecture.check_divisible(self.field, f"units {self.name} remove {self.field}")
        layer, producers = decoder.layer(block, consumer), architecture.mlps[consumer]
        every = torch.arange(layer.in_features, device=layer.weight.device)
        apart = torch.arange(architecture.rows_of_unit, device=every.device) * len(every)
        link = Link(every[:, None], torch.zeros_like(every), tuple(every[:, None] + apart for _ in producers))
        return LinkedLayers(consumer, producers, link)

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        return asked or (WIDE_MULTIPLE if shape.mlp_width >= WIDE else MULTIPLE)


@final
@dataclass(frozen=True)
class Values(LinkedUnits):
    """The value dimensions of the heads: a slot for each KV head, tied over its query heads."""

    rotated: bool = False
    field = "value_dim"
    part = "attention"

    @property
    def name(self) -> str:
        return "rotated-vo" if self.rotated else "vo"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.output,)

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        architecture, group, shape = decoder.architecture, decoder.heads.group, decoder.shape(block)
        dim = shape.value_dim
        device = decoder.layer(block, consumer).weight.device
        unit = torch.arange(shape.kv_heads * dim, device=device)
        slot = unit // dim
        query_head = slot[:, None] * group + torch.arange(group, device=device)
        *_, rows = rows_of_heads(architecture.joined, decoder.heads, shape, device)
        link = Link(query_head * dim + (unit % dim)[:, None], slot, (rows.reshape(-1, 1),))
        return LinkedLayers(consumer, (architecture.value,), link)

    def total(self, shape: BlockShape) -> int:
        return shape.value_dim * shape.kv_heads

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        asked = asked or MULTIPLE
        coarse = shape.value_dim % asked == 0 and (not alike or shape.value_dim >= STEPS * asked)
        return asked if coarse else 1


@final
@dataclass(frozen=True)
class KvGroups(LinkedUnits):
    """The KV heads, each with its query heads: one slot."""

    name = "kv-groups"
    field = "kv_heads"
    part = "attention"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return (architecture.output,)

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        architecture, heads, shape = decoder.architecture, decoder.heads, decoder.shape(block)
        architecture.check_divisible(self.field, f"units {self.name} remove {self.field}")
        device = decoder.layer(block, consumer).weight.device
        unit = torch.arange(shape.kv_heads, device=device)

        width = heads.group * shape.value_dim
        columns = unit[:, None] * width + torch.arange(width, device=device)
        rows = rows_of_heads(architecture.joined, heads, shape, device)
        rows = (torch.cat(rows, 1),) if architecture.joined else rows
        paths = tuple(dict.fromkeys((architecture.query, architecture.key, architecture.value)))
        return LinkedLayers(consumer, paths, Link(columns, torch.zeros_like(unit), rows))

    def multiple(self, shape: BlockShape, asked: int | None, alike: bool = False) -> int:
        return 1


def _in_order(decoder: Decoder, shape: BlockShape, consumers: Iterable[tuple[str, LinkedUnits]]) -> list[Target]:
    """The targets among these layers that a block of a shape has."""
    taps, sizes = decoder.architecture.taps, decoder.layer_sizes(shape)
    order = {path: number for number, path in enumerate(sizes)}
    there = [(path, kind) for path, kind in consumers if all(sizes[path])]
    return [Target(path, taps[path], kind) for path, kind in sorted(there, key=lambda pair: order[pair[0]])]
