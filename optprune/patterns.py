"""Patterns: sets of admissible masks. True means kept, and a pattern counts the kept entries."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError, check_count, check_kind
from optprune.numerics import linalg
from optprune.numerics.tensors import INTEGERS, as_indices, check_mask, kth_largest
from optprune.system.wording import shown, suggestion

NETWORK = 16
"""the longest rows that are sorted by comparing columns"""
ANY_COUNT = 1 << 62
"""more entries than a row can have"""


@dataclass(frozen=True, eq=False)
class Exchanges:
    """The exchanges of one kept entry for one dropped entry that lead from an admissible mask to another one."""

    group: int | None = None
    """the number of consecutive inputs among which entries change places; None for a whole row"""
    limits: tuple[int, int] | None = None
    """the least and the most entries of a row, where entries also move between rows; None where they do not"""
    fixed: Bool[Tensor, "out in"] | None = None
    """the entries that never change places; None where all may"""

    def free(self, mask: Bool[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return the entries that may change places."""
        return torch.ones_like(mask) if self.fixed is None else ~self.fixed

    def giving(self, mask: Bool[Tensor, "out in"]) -> tuple[Bool[Tensor, " out"], Bool[Tensor, " out"]]:
        """Return the rows that may have one entry less, and those that may have one more."""
        assert self.limits is not None
        (least, most), counts = self.limits, mask.sum(1)
        return counts > least, counts < most

    def pairs(self, mask: Bool[Tensor, "out in"]) -> Bool[Tensor, "n n"]:
        """Return which entries, numbered row by row, may be dropped for which others (the columns for the rows)."""
        index = torch.arange(mask.numel(), device=mask.device)
        # Groups fill whole rows.
        part = index // (self.group or mask.shape[1])
        pairs = part[:, None] == part
        if self.limits is not None:
            less, more = self.giving(mask)
            row = index // mask.shape[1]
            pairs |= more[row][:, None] & less[row]
        return pairs


class Pattern(ABC):
    """A set of admissible masks over scores of one fixed shape."""

    @abstractmethod
    def project(self, score: Tensor) -> Tensor:
        """Return the admissible mask with exactly the largest total score; ties go to the lower index."""

    @abstractmethod
    def admits(self, mask: Tensor) -> bool:
        """Return whether a mask is admissible."""

    def exchanges(self) -> Exchanges | None:
        """Return which exchanges of single weights keep a mask admissible; None where that is not known."""
        return None


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Keep exactly `keep` entries anywhere in the matrix."""

    keep: int

    def __post_init__(self) -> None:
        check_count("the number of entries to keep in a matrix", self.keep)

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return largest(score.reshape(1, -1), self.keep).reshape(score.shape)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        return int(mask.sum()) == self.keep

    def exchanges(self) -> Exchanges:
        return Exchanges(limits=(0, ANY_COUNT))


@final
@dataclass(frozen=True)
class RowWise(Pattern):
    """Keep exactly `keep` entries in every row (output)."""

    keep: int

    def __post_init__(self) -> None:
        check_count("the number of entries to keep in a row", self.keep)

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return largest(score, self.keep)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        return bool((mask.sum(1) == self.keep).all())

    def exchanges(self) -> Exchanges:
        return Exchanges()


@final
@dataclass(frozen=True)
class NM(Pattern):
    """Keep exactly `n` of every `m` consecutive inputs of a row: 2:4 is NM(2, 4)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        check_count("the N of an N:M pattern", self.n)
        check_count("the M of an N:M pattern", self.m)
        if not self.n <= self.m or self.m == 0:
            raise InputError(f"a {self.n}:{self.m} pattern cannot be: it keeps N of every M inputs, so N is at most M")

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if score.shape[1] % self.m:
            raise InputError(f"a {self.n}:{self.m} pattern needs a multiple of {self.m} inputs, not {score.shape[1]}")
        return largest(score.reshape(-1, self.m), self.n).reshape(score.shape)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        if mask.shape[1] % self.m:
            return False
        return bool((mask.reshape(-1, self.m).sum(1) == self.n).all())

    def exchanges(self) -> Exchanges:
        return Exchanges(group=self.m)


@final
@dataclass(frozen=True)
class RowLimits(Pattern):
    """Keep exactly `keep` entries anywhere in the matrix, at least `least` and at most `most` of them in every row."""

    keep: int
    least: int
    most: int

    def __post_init__(self) -> None:
        check_count("the number of entries to keep in a matrix", self.keep)
        for limit in (self.least, self.most):
            check_count("the limit of a row", limit)
        if not 0 <= self.least <= self.most:
            raise InputError(f"the limits of a row must be 0 <= least <= most, not {self.least} and {self.most}")

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        rows, width = score.shape
        most = min(self.most, width)
        if not rows * self.least <= self.keep <= rows * most:
            raise InputError(
                f"{rows} rows of {self.least} to {most} entries keep {rows * self.least} to {rows * most}, "
                f"not {self.keep}"
            )
        # The best of every row, and then the best of what the rows have room for: a greedy choice, which is exact here.
        first = largest(score, self.least)
        room = largest(score, most) & ~first
        rest = largest(score[room][None], self.keep - rows * self.least)[0]
        return first.masked_scatter(room, rest)

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        counts = mask.sum(1)
        return int(counts.sum()) == self.keep and bool(((counts >= self.least) & (counts <= self.most)).all())

    def exchanges(self) -> Exchanges:
        return Exchanges(limits=(self.least, self.most))


@final
@dataclass(frozen=True, eq=False)
class PartlyFixed(Pattern):
    """Keep the entries of `stays`, drop those of `goes`, and choose the others so that all together fit a pattern."""

    pattern: Pattern
    stays: Bool[Tensor, "out in"]
    """the entries that every mask keeps"""
    goes: Bool[Tensor, "out in"]
    """the entries that no mask keeps"""

    def __post_init__(self) -> None:
        check_kind("the pattern of the other entries", self.pattern, Pattern, "give an instance, e.g. RowWise(4)")
        check_mask("the mask of what stays", self.stays, ("out", "in"))
        check_mask("the mask of what goes", self.goes, self.stays.shape, self.stays)

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        check_mask("the mask of what stays", self.stays, score.shape, score)
        forced = score.masked_fill(self.stays, torch.inf).masked_fill(self.goes, -torch.inf)
        mask = self.pattern.project(forced)
        if not self._agrees(mask):
            raise InputError("no mask of the pattern keeps all that must stay and nothing that must go")
        return mask

    def admits(self, mask: Bool[Tensor, "out in"]) -> bool:
        return self._agrees(mask) and self.pattern.admits(mask)

    def exchanges(self) -> Exchanges | None:
        inner, own = self.pattern.exchanges(), self.stays | self.goes
        if inner is None:
            return None
        return replace(inner, fixed=own if inner.fixed is None else inner.fixed | own)

    def _agrees(self, mask: Bool[Tensor, "out in"]) -> bool:
        return not bool(((self.stays & ~mask) | (self.goes & mask)).any())


@final
@dataclass(frozen=True, eq=False)
class SlotWise(Pattern):
    """Keep exactly `keep` units in every slot. A slot is a set of units, e.g. the dimensions of one KV head."""

    slots: Int[Tensor, " units"]
    """the slot of each unit; all slots have the same size"""
    keep: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", as_indices("the slots of units", self.slots, ("units",)))
        check_count("the number of units to keep in a slot", self.keep)

    def project(self, score: Float[Tensor, " units"]) -> Bool[Tensor, " units"]:
        if score.shape != self.slots.shape:
            raise InputError(
                f"a choice among {len(self.slots)} units takes a score for each, not scores of the shape "
                f"{list(score.shape)}: single weights have other patterns, e.g. RowWise"
            )
        order = torch.argsort(self.slots, stable=True)
        mask = torch.zeros_like(self.slots, dtype=torch.bool)
        mask[order] = largest(score[order].reshape(self._count, -1), self.keep).reshape(-1)
        return mask

    def admits(self, mask: Bool[Tensor, " units"]) -> bool:
        counts = torch.zeros(self._count, dtype=torch.long, device=mask.device)
        counts.scatter_add_(0, self.slots, mask.long())
        return bool((counts == self.keep).all())

    @cached_property
    def _count(self) -> int:
        return int(self.slots.max()) + 1


class PatternFamily(ABC):
    """A family of patterns: one for every shape of a layer and every share of kept weights."""

    name: str
    """the name in a recipe"""
    only_share: float | None = None
    """the only share that a layer may keep unless it keeps all, or None where any share is admissible"""
    multiple: int = 1
    """the divisor of the number of inputs"""

    @abstractmethod
    def of(self, outputs: int, inputs: int, share: float) -> Pattern:
        """Return the pattern of a layer that keeps a share of its weights."""

    @abstractmethod
    def keep(self, outputs: int, inputs: int, share: float) -> int:
        """Return the number of weights that such a layer keeps."""

    def admits(self, share: float) -> bool:
        """Return whether a layer may keep this share."""
        return self.only_share is None or min(abs(share - 1), abs(share - self.only_share)) <= 1e-6


@final
@dataclass(frozen=True)
class InMatrix(PatternFamily):
    """Unstructured patterns: the kept weights are anywhere in a layer's matrix."""

    name = "unstructured"

    def of(self, outputs: int, inputs: int, share: float) -> Pattern:
        return Unstructured(self.keep(outputs, inputs, share))

    def keep(self, outputs: int, inputs: int, share: float) -> int:
        return round(share * (outputs * inputs))


@final
@dataclass(frozen=True)
class InRows(PatternFamily):
    """Row-wise patterns: the same number of kept weights in every row of a layer."""

    name = "rows"

    def of(self, outputs: int, inputs: int, share: float) -> Pattern:
        return RowWise(round(share * inputs))

    def keep(self, outputs: int, inputs: int, share: float) -> int:
        return outputs * round(share * inputs)


@final
@dataclass(frozen=True)
class InGroups(PatternFamily):
    """N:M patterns: n of every m consecutive inputs of a row, or all."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(f"the pattern {self.name} keeps everything: N must be less than M, as in 2:4")

    @property
    def name(self) -> str:  # type: ignore[override]  # by its numbers
        return f"{self.n}:{self.m}"

    @property
    def only_share(self) -> float:  # type: ignore[override]
        return self.n / self.m

    @property
    def multiple(self) -> int:  # type: ignore[override]
        return self.m

    def of(self, outputs: int, inputs: int, share: float) -> Pattern:
        return NM(self.n, self.m)

    def keep(self, outputs: int, inputs: int, share: float) -> int:
        return outputs * inputs * self.n // self.m


ANYWHERE = InMatrix()


def pattern_family(name: str) -> PatternFamily:
    """Return the family with a name in a recipe: unstructured, rows, or N:M such as 2:4."""
    for family in (ANYWHERE, InRows()):
        if name == family.name:
            return family
    numbers = re.fullmatch(r"([1-9][0-9]{0,8}):([1-9][0-9]{0,8})", name)
    if numbers is None:
        nearest = suggestion(name, (ANYWHERE.name, InRows.name))
        raise InputError(f"the pattern {shown(name)} is not known{nearest}: use unstructured, rows, or N:M such as 2:4")
    return InGroups(int(numbers[1]), int(numbers[2]))


def largest(score: Float[Tensor, "rows n"], keep: int) -> Bool[Tensor, "rows n"]:
    """Return the mask of exactly the `keep` largest scores of every row; ties go to the lower index."""
    rows, n = score.shape
    if not 0 <= keep <= n:
        raise InputError(f"cannot keep {keep} of {n} entries")
    if keep in (0, n):
        threshold, mask = score[:, :1], torch.full_like(score, keep > 0, dtype=torch.bool)
    else:
        threshold = _kth_largest(score, keep)
        mask = score >= threshold
    # The sum is one fast pass, and almost always finite. Both are read together, so that a GPU is waited for once.
    finite, count = linalg.numbers(torch.isfinite(score.sum()).long(), torch.count_nonzero(mask))
    if not finite and bool(torch.isnan(score).any()):
        raise InputError("a score is NaN, so the entries cannot be ranked: look for NaN in the weights or moments")
    if count == rows * keep:
        return mask
    above = score > threshold
    missing = keep - above.sum(1, keepdim=True)
    tied = score == threshold
    return above | (tied & (tied.cumsum(1) <= missing))


def within(mask: Bool[Tensor, "*rows n"], values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Return the values where the mask is true and zeros, of either sign, elsewhere, for finite values in hot loops.

    On a CPU torch.where(mask, values, 0) takes several times as long for an irregular mask.
    """
    return values * mask.view(torch.uint8)


def in_order(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the values in ascending order; on a CPU by NumPy, whose sort is several times as fast as torch's."""
    if _for_numpy(values):
        return linalg.from_numpy(np.sort(values.detach().numpy()))
    return values.sort().values


def _for_numpy(values: Tensor) -> bool:
    """Return whether NumPy can read the values without a copy."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _kth_largest(score: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows 1"]:
    """Return the k-th largest score of every row."""
    n = score.shape[1]
    if n <= NETWORK:
        # Sorted column by column (odd-even transposition): the groups of an N:M pattern are many and short.
        columns = list(score.T.contiguous())
        for turn in range(n):
            for j in range(turn % 2, n - 1, 2):
                first, second = columns[j], columns[j + 1]
                columns[j], columns[j + 1] = torch.minimum(first, second), torch.maximum(first, second)
        return columns[n - k][:, None]
    if _for_numpy(score):
        # NumPy's partition is ten times as fast as torch's kthvalue.
        # A copy, because a view would keep the whole partitioned array.
        return linalg.from_numpy(np.partition(score.detach().numpy(), n - k, axis=1)[:, n - k, None].copy())
    if score.device.type != "cpu" and score.dtype in INTEGERS:
        # On a GPU kthvalue uses one block of threads per row, and a row may be a whole matrix.
        return kth_largest(score, k)
    return torch.kthvalue(score, n - k + 1, dim=1, keepdim=True).values
