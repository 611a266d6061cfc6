"""Measure the pattern of a model from its weights, whoever pruned it: what is really zero, and in what order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optprune.models import Decoder

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
