"""Units that could be cut off for free: whose weights, as they are stored, make nothing or are read by nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from optprune.models import Decoder, LinkedLayers, LinkedUnits, Mlp, Values
from optprune.system.wording import one_line


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
