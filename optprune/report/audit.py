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


def layer_pattern(name: str, weight: Tensor) -> LayerPattern:
    """Measure one weight [out, in]."""
    kept = weight != 0
    by_row = kept.sum(1)
    outputs, inputs = weight.shape
    held = tuple(f"{n}:{m}" for n, m in NAMED if inputs % m == 0 and bool((kept.reshape(-1, m).sum(1) <= n).all()))
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
