"""Zeros in the weights of a model: patterns of layers, and dead units."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from optprune.models import Decoder, LinkedLayers, LinkedUnits, Mlp, Values
from optprune.system.wording import one_line

NAMED = ((2, 4), (4, 8))
"""the N:M patterns of hardware and papers"""


@dataclass(frozen=True)
class LayerPattern:
    """Zeros of a linear layer."""

    name: str
    outputs: int
    inputs: int
    zeros: int
    same_in_rows: bool
    """whether all rows have the same number of zeros"""
    patterns: tuple[str, ...]
    """the patterns in `NAMED` that hold: at most N of M consecutive inputs are not zero"""
    zero_inputs: int
    """the number of columns of zeros only"""
    zero_outputs: int
    """the number of rows of zeros only"""

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / (self.outputs * self.inputs)


@dataclass(frozen=True)
class BrokenGroups:
    """Groups of a layer with more nonzero weights than an N:M pattern allows."""

    pattern: str
    groups: int
    """the number of groups of M consecutive inputs of a row; 0 where M does not divide the number of inputs"""
    broken: int
    """the number of groups with more than N nonzero weights"""
    row: int = 0
    """the row of the first such group"""
    first_input: int = 0
    """the first input of that group"""

    @property
    def holds(self) -> bool:
        """Whether the pattern holds in every group."""
        return self.groups > 0 and not self.broken


def broken_groups(weight: Tensor, n: int, m: int) -> BrokenGroups:
    """Return the groups of a weight [out, in] that break N:M."""
    inputs = weight.shape[1]
    if inputs % m:
        return BrokenGroups(f"{n}:{m}", 0, 0)
    over = (weight != 0).reshape(-1, m).sum(1, dtype=torch.int32) > n
    broken = int(over.sum())
    first = int(over.int().argmax()) * m if broken else 0
    return BrokenGroups(f"{n}:{m}", over.numel(), broken, *divmod(first, inputs))


def layer_pattern(name: str, weight: Tensor) -> LayerPattern:
    """Return the zeros of a weight [out, in]."""
    kept = weight != 0
    by_row = kept.sum(1)
    outputs, inputs = weight.shape
    holding = tuple(f"{n}:{m}" for n, m in NAMED if broken_groups(weight, n, m).holds)
    return LayerPattern(
        name=name,
        outputs=outputs,
        inputs=inputs,
        zeros=int((~kept).sum()),
        same_in_rows=bool((by_row == by_row[0]).all()),
        patterns=holding,
        zero_inputs=int((~kept.any(0)).sum()),
        zero_outputs=int((~kept.any(1)).sum()),
    )


def model_patterns(decoder: Decoder) -> list[LayerPattern]:
    """Return the zeros of every linear layer of the decoder blocks."""
    found = []
    for block in range(len(decoder.blocks)):
        with torch.no_grad(), decoder.resident(block):
            for path in decoder.paths(block):
                found.append(layer_pattern(decoder.name(block, path), decoder.layer(block, path).weight))
    return found


@dataclass(frozen=True, eq=False)
class Zeros:
    """Masks of the rows and columns of a tensor that are zeros only; a bias is a column."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Zeros":
        """Return the masks of a tensor [out, in]."""
        kept = tensor != 0
        return cls(~kept.any(1), ~kept.any(0))


@dataclass(frozen=True)
class DeadUnits:
    """Units of one kind whose removal from a block changes no output."""

    block: int
    units: str
    """the unit kind: mlp or vo"""
    numbers: tuple[int, ...]
    """their numbers over all KV heads or experts, equally many of each, since each keeps the same number"""

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self.numbers)


def dead_units(decoder: Decoder, zeros: Mapping[str, Zeros]) -> tuple[DeadUnits, ...]:
    """Return the dead units of every block, from the zeros of its tensors by their full names.

    A unit is dead if all columns that read it are zero, or if a row that produces it is zero with its bias and the
    activation of zero is zero.
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
    """Return the units that are dead in some linked layers."""
    channels = layers.channels
    consumer = zeros.get(f"{decoder.name(block, layers.consumer)}.weight")
    dead = torch.zeros(channels.units, dtype=torch.bool)
    if consumer is not None and int(channels.columns.max()) < len(consumer.columns):
        dead |= consumer.columns[channels.columns].all(1)
    if kind.affine or _keeps_zero(decoder):
        for path, rows in zip(layers.producers, layers.rows, strict=True):
            weight, bias = (zeros.get(f"{decoder.name(block, path)}.{part}") for part in ("weight", "bias"))
            if weight is not None and int(rows.max()) < len(weight.rows):
                silent = weight.rows if bias is None else weight.rows & bias.rows
                dead |= silent[rows].all(1)
    return torch.nonzero(dead)[:, 0].tolist()


def _keeps_zero(decoder: Decoder) -> bool:
    """Return whether the activation of the MLP maps zero to zero, as most do."""
    config = decoder.model.config
    fields = ("hidden_act", "activation_function", "hidden_activation")
    name = next((found for field in fields if (found := getattr(config, field, None))), None)
    return name in ACT2FN and not bool(ACT2FN[one_line(name)](torch.zeros(1)).any())
