"""Zeros in the weights of a model: their pattern in each layer, and dead units."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from optprune.models import Decoder, LinkedLayers, LinkedUnits, Mlp, Values
from optprune.system.wording import one_line

NAMED = ((2, 4), (4, 8))
"""the N:M patterns that hardware or papers name"""


@dataclass(frozen=True)
class LayerPattern:
    """What the zeros of one linear layer look like."""

    name: str
    outputs: int
    inputs: int
    zeros: int
    same_in_rows: bool
    """whether every row has the same number of zeros"""
    patterns: tuple[str, ...]
    """the N:M patterns that hold in every group: at most N of M consecutive inputs are not zero"""
    zero_inputs: int
    """the number of columns that are zero altogether"""
    zero_outputs: int
    """the number of rows that are zero altogether"""

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / (self.outputs * self.inputs)


@dataclass(frozen=True)
class BrokenGroups:
    """The groups of a layer that keep more than an N:M pattern lets them."""

    pattern: str
    groups: int
    """how many groups there are, of M consecutive inputs of a row; none where M does not divide the inputs"""
    broken: int
    """how many of them keep more than N"""
    row: int = 0
    """the row of the first one"""
    first_input: int = 0
    """the input that it begins with"""

    @property
    def holds(self) -> bool:
        """Whether the pattern holds in every group."""
        return self.groups > 0 and not self.broken


def broken_groups(weight: Tensor, n: int, m: int) -> BrokenGroups:
    """The groups of a weight [out, in] that break N:M."""
    inputs = weight.shape[1]
    if inputs % m:
        return BrokenGroups(f"{n}:{m}", 0, 0)
    over = (weight != 0).reshape(-1, m).sum(1, dtype=torch.int32) > n
    broken = int(over.sum())
    first = int(over.int().argmax()) * m if broken else 0
    return BrokenGroups(f"{n}:{m}", over.numel(), broken, *divmod(first, inputs))


def layer_pattern(name: str, weight: Tensor) -> LayerPattern:
    """Measure one weight [out, in]."""
    kept = weight != 0
    by_row = kept.sum(1)
    outputs, inputs = weight.shape
    held = tuple(f"{n}:{m}" for n, m in NAMED if broken_groups(weight, n, m).holds)
    return LayerPattern(
        name=name,
        outputs=outputs,
        inputs=inputs,
        zeros=int((~kept).sum()),
        same_in_rows=bool((by_row == by_row[0]).all()),
        patterns=held,
        zero_inputs=int((~kept.any(0)).sum()),
        zero_outputs=int((~kept.any(1)).sum()),
    )


def model_patterns(decoder: Decoder) -> list[LayerPattern]:
    """Measure every linear layer of the decoder blocks."""
    found = []
    for block in range(len(decoder.blocks)):
        with torch.no_grad(), decoder.resident(block):
            for path in decoder.paths(block):
                found.append(layer_pattern(decoder.name(block, path), decoder.layer(block, path).weight))
    return found


@dataclass(frozen=True, eq=False)
class Zeros:
    """Which rows and columns of a tensor are zero altogether; a bias is a column."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Zeros":
        """Of a tensor [out, in]."""
        kept = tensor != 0
        return cls(~kept.any(1), ~kept.any(0))


@dataclass(frozen=True)
class DeadUnits:
    """The units of one kind that a block could lose without a change of any output."""

    block: int
    units: str
    """mlp or vo, as recipes name them"""
    numbers: tuple[int, ...]
    """which, counted over all KV heads, or all experts: of each as many, since they keep equally many"""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.numbers)


def dead_units(decoder: Decoder, zeros: Mapping[str, Zeros]) -> tuple[DeadUnits, ...]:
    """The dead units of every block, from the zeros of its tensors by their full names.

    A unit is dead where all columns that read it are zero, or a row that makes it is, with its bias, and what the model
    makes of that is zero.
    """
    found = []
    for block in range(len(decoder.blocks)):
        for kind in (Values(), Mlp()):
            if kind.there(decoder.shape(block)) and kind.field not in decoder.architecture.indivisible:
                every = [_dead(decoder, block, kind, layers, zeros) for layers in kind.layers(decoder, block)]
                least, total = min(map(len, every)), kind.total(decoder.shape(block))
                numbers = [place * total + unit for place, units in enumerate(every) for unit in units[:least]]
                if numbers:
                    found.append(DeadUnits(block, kind.name, tuple(numbers)))
    return tuple(found)


def _dead(
    decoder: Decoder, block: int, kind: LinkedUnits, layers: LinkedLayers, zeros: Mapping[str, Zeros]
) -> list[int]:
    """The dead units of one link."""
    link = layers.link
    consumer = zeros.get(f"{decoder.name(block, layers.consumer)}.weight")
    dead = torch.zeros(link.units, dtype=torch.bool)
    if consumer is not None and int(link.columns.max()) < len(consumer.columns):
        dead |= consumer.columns[link.columns].all(1)
    if isinstance(kind, Values) or _keeps_zero(decoder):
        for path, rows in zip(layers.producers, link.rows, strict=True):
            weight, bias = (zeros.get(f"{decoder.name(block, path)}.{part}") for part in ("weight", "bias"))
            if weight is not None and int(rows.max()) < len(weight.rows):
                silent = weight.rows if bias is None else weight.rows & bias.rows
                dead |= silent[rows].all(1)
    return torch.nonzero(dead)[:, 0].tolist()


def _keeps_zero(decoder: Decoder) -> bool:
    """Whether the activation of an MLP makes zero of zero, as most do."""
    config = decoder.model.config
    fields = ("hidden_act", "activation_function", "hidden_activation")
    name = next((found for field in fields if (found := getattr(config, field, None))), None)
    return name in ACT2FN and not bool(ACT2FN[one_line(name)](torch.zeros(1)).any())
