"""Patterns: what a mask may look like. True means kept; a pattern counts what is kept, never what is removed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError


class Pattern(ABC):
    """A set of admissible masks over scores of one fixed shape."""

    @abstractmethod
    def project(self, score: Tensor) -> Tensor:
        """The admissible mask with the largest total score, exactly; ties go to the lower index."""

    @abstractmethod
    def admits(self, mask: Tensor) -> bool:
        """Whether the mask is one of the pattern's."""


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Keep exactly `keep` entries anywhere in the matrix."""

    keep: int

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return largest(score.reshape(1, -1), self.keep).reshape(score.shape)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        return int(mask.sum()) == self.keep


@final
@dataclass(frozen=True)
class RowWise(Pattern):
    """Keep exactly `keep` entries in every row (output)."""

    keep: int

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return largest(score, self.keep)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        return bool((mask.sum(1) == self.keep).all())


@final
@dataclass(frozen=True)
class NM(Pattern):
    """Keep exactly `n` of every `m` consecutive inputs of a row: 2:4 is NM(2, 4)."""

    n: int
    m: int

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if score.shape[1] % self.m:
            raise InputError(f"a {self.n}:{self.m} pattern needs a multiple of {self.m} inputs, not {score.shape[1]}")
        return largest(score.reshape(-1, self.m), self.n).reshape(score.shape)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        if mask.shape[1] % self.m:
            return False
        return bool((mask.reshape(-1, self.m).sum(1) == self.n).all())


@final
@dataclass(frozen=True, eq=False)
class SlotWise(Pattern):
    """Keep exactly `keep` units in every slot. A slot is a set of units, e.g. the dimensions of one KV head."""

    slots: Int[Tensor, " units"]
    """the slot of each unit; all slots have the same size"""
    keep: int

    def project(self, score: Float[Tensor, " units"]) -> Bool[Tensor, " units"]:
        order = torch.argsort(self.slots, stable=True)
        count = int(self.slots.max()) + 1
        mask = torch.zeros_like(self.slots, dtype=torch.bool)
        mask[order] = largest(score[order].reshape(count, -1), self.keep).reshape(-1)
        return mask

    def admits(self, mask: Bool[Tensor, " units"]) -> bool:
        counts = torch.zeros(int(self.slots.max()) + 1, dtype=torch.long, device=mask.device)
        counts.scatter_add_(0, self.slots, mask.long())
        return bool((counts == self.keep).all())


def largest(score: Float[Tensor, "rows n"], keep: int) -> Bool[Tensor, "rows n"]:
    """Mask of the `keep` largest scores of every row, exactly that many; ties go to the lower index."""
    n = score.shape[1]
    if not 0 <= keep <= n:
        raise InputError(f"cannot keep {keep} of {n} entries")
    if bool(torch.isnan(score).any()):
        raise InputError("a score is NaN, so the entries cannot be ranked: look for NaN in the weights or moments")
    if keep in (0, n):
        return torch.full_like(score, keep > 0, dtype=torch.bool)
    threshold = torch.kthvalue(score, n - keep + 1, dim=1, keepdim=True).values
    above = score > threshold
    missing = keep - above.sum(1, keepdim=True)
    tied = score == threshold
    return above | (tied & (tied.cumsum(1) <= missing))
