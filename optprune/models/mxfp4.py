"""MXFP4, in which checkpoints of GPT-OSS hold experts: numbers of four bits, of which 32 share a power of two.

The format is that of the Open Compute Project's Microscaling Formats 1.0, E2M1 with scales E8M0, packed as
transformers' `convert_moe_packed_tensors` reads it: a byte holds two numbers, the first in its lower half.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.models.checkpoint import InFiles, StoredTensor, is_plain

BLOCKS, SCALES = "_blocks", "_scales"
"""the endings of the names of the two tensors that hold one"""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHARED = 32
"""the numbers that share a scale"""
BIAS = 127
"""the scale that stands for one"""


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Matrices [in, out], in files the rows of the transposed ones: packed numbers, and a scale for 32 of them."""

    blocks: StoredTensor
    """the packed numbers, uint8 [..., out, in / 32, 16]"""
    scales: StoredTensor
    """the powers of two, uint8 [..., out, in / 32]"""
    turned: bool = False
    """whether the matrices are given as [out, in]"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrices."""
        *outer, rows, groups = self.scales.shape
        matrix = (rows, groups * SHARED)
        return (*outer, *(matrix if self.turned else matrix[::-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is read, which holds every number of the format exactly."""
        return torch.bfloat16

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold both tensors."""
        return tuple(dict.fromkeys((self.blocks.file, self.scales.file)))

    def item(self, number: int) -> Self:
        """Return one of the matrices."""
        return replace(self, blocks=self.blocks.item(number), scales=self.scales.item(number))

    def transposed(self) -> Self:
        """Return the matrix as [out, in], where it was [in, out], or the reverse."""
        return replace(self, turned=not self.turned)

    def rows(self, taken: range) -> Self:
        """Return some of the rows of a matrix [out, in]."""
        assert self.turned
        return replace(self, blocks=self.blocks.rows(taken), scales=self.scales.rows(taken))

    def read(self) -> Tensor:
        """Return the numbers; the scale 255 gives NaN or infinity, which the users of a weight refuse."""
        if len(self.shape) > 2:  # one by one, because the places in the table take more memory than the numbers
            return torch.stack([self.item(number).read() for number in range(self.shape[0])])
        found = unpacked(self.blocks.read(), self.scales.read())
        return found if self.turned else found.t().contiguous()


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers [rows, 32 groups] of packed ones [rows, groups, 16] with scales [rows, groups]."""
    table = torch.tensor([sign * size for sign in (1.0, -1.0) for size in MAGNITUDES])
    halves = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    numbers = torch.ldexp(table[halves.int()], scales[..., None].int() - BIAS)
    return numbers.flatten(-2).to(torch.bfloat16)


def is_packed(name: str, dtype: torch.dtype) -> bool:
    """Return whether a tensor may be in a checkpoint with experts in this format."""
    return is_plain(name, dtype) or (name.endswith((BLOCKS, SCALES)) and dtype == torch.uint8)


def paired(tensors: Mapping[str, InFiles], source: str) -> dict[str, InFiles]:
    """Return the tensors with one for each two that hold numbers and their scales; InputError where they do not fit."""
    found: dict[str, InFiles] = {}
    for name, tensor in tensors.items():
        own = name.removesuffix(BLOCKS) if name.endswith(BLOCKS) else name.removesuffix(SCALES)
        blocks, scales = (tensors.get(f"{own}{ending}") for ending in (BLOCKS, SCALES))
        if own == name:
            found[name] = tensor
        elif not (isinstance(blocks, StoredTensor) and isinstance(scales, StoredTensor) and _fit(blocks, scales)):
            raise InputError(
                f"{own} of {source} is in mxfp4, but its {BLOCKS[1:]} and {SCALES[1:]} do not fit together: fetch "
                "the weights again"
            )
        else:
            found[own] = Mxfp4Tensor(blocks, scales)
    return found


def _fit(blocks: StoredTensor, scales: StoredTensor) -> bool:
    packed = blocks.dtype == scales.dtype == torch.uint8
    return packed and blocks.shape == (*scales.shape, SHARED // 2) and len(scales.shape) > 1
