"""Penalties: convex functions of a weight matrix whose proximal operator is cheap.

A new norm is one frozen dataclass with three short methods: value, prox and dual_norm. FISTA solves with any penalty
and certifies with any.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError, check_kind
from optprune.numerics import linalg
from optprune.numerics.tensors import check_real
from optprune.system.wording import shown


class Penalty(ABC):
    """A convex function P of a weight [out, in], with P(0) = 0 its least value."""

    @property
    def separable(self) -> bool:
        """Whether P is a sum over single entries, so that prox accepts a step for each column or entry."""
        return False

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise InputError where P is not a function of weights of a shape; by default it is one of all."""
        return

    @abstractmethod
    def value(self, weight: Float[Tensor, "out in"]) -> float:
        """Return P(V), in float64."""

    @abstractmethod
    def prox(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "*columns"]) -> Float[Tensor, "out in"]:
        """Return the proximal point argmin_U P(U) + sum_ij (U_ij - V_ij)^2 / (2 step).

        `step` is a scalar tensor; a separable penalty also takes one step for each column, [in], or weight, [out, in].
        """

    @abstractmethod
    def conjugate(self, dual: Float[Tensor, "out in"]) -> float:
        """Return P*(T) = sup_V <T, V> - P(V), in float64; infinity outside its domain."""

    def reach(self, level: float, size: Float[Tensor, "out in"]) -> float:
        """Return an upper bound of |V * size|, in the Frobenius norm, for all V with P(V) <= level; infinity for none.

        With it optima are certified where the loss alone does not bound their size, because the Gram matrix is
        singular.
        """
        return math.inf


class NormPenalty(Penalty):
    """A penalty that is a norm: its conjugate is 0 where the dual norm is at most 1, and infinite elsewhere."""

    @abstractmethod
    def dual_norm(self, dual: Float[Tensor, "out in"]) -> float:
        """Return the least t >= 0 with <T, V> <= t P(V) for all V; infinity if there is none."""

    def conjugate(self, dual: Float[Tensor, "out in"]) -> float:
        # A dual point scaled onto the unit ball may exceed it by a rounding error.
        return 0.0 if self.dual_norm(dual) <= 1 + 4 * torch.finfo(dual.dtype).eps else math.inf


def _nonnegative(what: str, value: float) -> None:
    check_kind(what, value, Real, "give a number")
    if not (value >= 0 and math.isfinite(value)):
        raise InputError(f"{what} must be finite and not negative, not {shown(value)}")


@final
@dataclass(frozen=True)
class L1(NormPenalty):
    """strength * sum_ij |V_ij|, the penalty of FISTAPruner (arXiv 2408.03728)."""

    strength: float

    def __post_init__(self) -> None:
        _nonnegative("the strength of an l1 penalty", self.strength)

    @property
    def separable(self) -> bool:
        return True

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        return self.strength * float(weight.double().abs().sum())

    def prox(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "*columns"]) -> Float[Tensor, "out in"]:
        return shrink(weight, self.strength * step)

    def dual_norm(self, dual: Float[Tensor, "out in"]) -> float:
        largest = float(dual.abs().max())
        return largest / self.strength if self.strength else (math.inf if largest else 0.0)

    def reach(self, level: float, size: Float[Tensor, "out in"]) -> float:
        return level * _largest_share(size, self.strength)


@final
@dataclass(frozen=True, eq=False)
class WeightedL1(NormPenalty):
    """sum_ij weights_ij |V_ij|, with weights [out, in], [in] or [out, 1], none of them negative."""

    weights: Float[Tensor, "*shape"]

    def __post_init__(self) -> None:
        check_kind("weights of an l1 penalty", self.weights, Tensor, "give a tensor; L1 takes a single number")
        check_real("weights of an l1 penalty", self.weights, self.weights.shape)
        if not self.weights.numel():
            raise InputError("the weights of an l1 penalty are empty: give one for each input, output or entry")
        least, largest = linalg.numbers(*torch.aminmax(self.weights))
        _nonnegative("the least weight of an l1 penalty", least)
        _nonnegative("the largest weight of an l1 penalty", largest)

    @property
    def separable(self) -> bool:
        return True

    def check_shape(self, shape: Sequence[int]) -> None:
        rows, width = shape
        if tuple(self.weights.shape) not in ((rows, width), (width,), (rows, 1), (1, width), ()):
            raise InputError(
                f"the weights of an l1 penalty on a [{rows}, {width}] weight must be [{rows}, {width}], [{width}] or "
                f"[{rows}, 1], not {list(self.weights.shape)}"
            )

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        return float((self.weights.double() * weight.double().abs()).sum())

    def prox(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "*columns"]) -> Float[Tensor, "out in"]:
        # A penalty may have another dtype than its problem.
        return shrink(weight, self.weights.to(weight) * step)

    def dual_norm(self, dual: Float[Tensor, "out in"]) -> float:
        # 0/0 is an entry without penalty and without dual; x/0 is one that no scaling makes feasible.
        return float(torch.nan_to_num(dual.abs() / self.weights, nan=0.0, posinf=math.inf).max())

    def reach(self, level: float, size: Float[Tensor, "out in"]) -> float:
        return level * float(torch.nan_to_num(size / self.weights.double(), nan=0.0, posinf=math.inf).max())


@final
@dataclass(frozen=True)
class ElasticNet(Penalty):
    """strength * sum |V_ij| + ridge / 2 * sum V_ij^2 (Zou and Hastie, 2005), shrinking towards zero, unlike damping."""

    strength: float
    ridge: float

    def __post_init__(self) -> None:
        _nonnegative("the strength of an elastic net", self.strength)
        _nonnegative("the ridge of an elastic net", self.ridge)

    @property
    def separable(self) -> bool:
        return True

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        exact = weight.double()
        return self.strength * float(exact.abs().sum()) + self.ridge / 2 * float(exact.square().sum())

    def prox(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "*columns"]) -> Float[Tensor, "out in"]:
        return shrink(weight, self.strength * step) / (1 + self.ridge * step)

    def conjugate(self, dual: Float[Tensor, "out in"]) -> float:
        excess = (dual.double().abs() - self.strength).clamp(min=0)
        if self.ridge == 0:
            return L1(self.strength).conjugate(dual)
        return float(excess.square().sum()) / (2 * self.ridge)

    def reach(self, level: float, size: Float[Tensor, "out in"]) -> float:
        by_ridge = math.sqrt(2 * level * _largest_share(size, self.ridge) * float(size.max()))
        return min(level * _largest_share(size, self.strength), by_ridge)


@final
@dataclass(frozen=True)
class ColumnGroups(NormPenalty):
    """strength * sum_j |V_:,j|_2: a group lasso whose groups are the columns, so that whole inputs vanish."""

    strength: float

    def __post_init__(self) -> None:
        _nonnegative("the strength of a group penalty", self.strength)

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        return self.strength * float(linalg.norm(weight.double(), 0).sum())

    def prox(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "*columns"]) -> Float[Tensor, "out in"]:
        norms = linalg.norm(weight, 0)
        kept = (norms - self.strength * step).clamp(min=0)
        return weight * (kept / torch.where(norms > 0, norms, 1.0))

    def dual_norm(self, dual: Float[Tensor, "out in"]) -> float:
        largest = float(linalg.norm(dual.double(), 0).max())
        return largest / self.strength if self.strength else (math.inf if largest else 0.0)

    def reach(self, level: float, size: Float[Tensor, "out in"]) -> float:
        return level * _largest_share(size, self.strength)


def _largest_share(size: Float[Tensor, "out in"], strength: float) -> float:
    """Return the largest size over a strength; infinity where the strength is zero."""
    largest = float(size.max())
    return largest / strength if strength else (math.inf if largest else 0.0)


def shrink(weight: Float[Tensor, "out in"], threshold: Float[Tensor, "*shape"]) -> Float[Tensor, "out in"]:
    """Return sign(V) max(|V| - threshold, 0): soft thresholding."""
    if threshold.ndim == 0 and threshold.device.type == "cpu":
        # One pass; a threshold that is a tensor costs several, even without dimensions.
        return torch.nn.functional.softshrink(weight, float(threshold))
    clipped = weight.clamp(-threshold, threshold)
    return torch.sub(weight, clipped, out=clipped)
