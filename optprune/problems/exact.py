"""The loss of a layer in float64, by which every objective is measured, for solvers of every dtype.

Only blocks of rows and columns are copied to float64 at a time. A GPU multiplies in float64 at a fraction of its speed
in float32, down to a sixty-fourth, so that there an objective may be measured by float32 products of at most BLOCK
terms, whose results are added up in float64 (`ExactLoss.products`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.numerics import linalg
from optprune.numerics.precision import full_precision
from optprune.numerics.rounding import OUTWARD, gamma

BLOCK = 512
"""columns, or rows, in float64 at a time, so that the additional memory is small"""
ALL = slice(None)
Part: TypeAlias = Callable[[slice, slice], Tensor]
"""the rows and columns of a matrix in float64"""


@dataclass(frozen=True, eq=False)
class ExactLoss:
    """A weight, the statistics of its inputs and the metric, whose products and sums are those of float64."""

    weight: Tensor
    moments: InputMoments
    damping: Tensor
    metric: OutputMetric | None
    products: torch.dtype = torch.float64
    r"""the dtype of matrix products: float32 is for moments and weights of that dtype

    Then a product of BLOCK terms is off by at most gamma = BLOCK u / (1 - BLOCK u), u = 2^-24, of the sum of the sizes
    of its terms, and rounding V - W by u of each; sums, the products with V - W and the means are in
    float64. With e = (1 + u) (1 + gamma) - 1 for a product with an operand that was rounded, the error of tr(S D M D^T)
    is at most (1 + e)^2 - 1 of tr(|S| |D| |M| |D|^T), where there is no full metric e of it, D = V - W. As D is formed
    before anything is multiplied, that is small where V is near W, however large W is. The moments are known to no
    more: `LayerLoss.rounding` is above it, since |D| <= |V| + |W|. With a drift d two terms come on top, the same share
    of 2 tr(|S| |D| (|W| |Cov(d, x*)|)^T) and of tr(|S| |W| |Cov(d)| |W|^T).
    """

    @property
    def fast(self) -> "ExactLoss":
        """The same loss, by float32 products where float64 ones are slow and the moments are float32."""
        single = self.weight.device.type != "cpu" and self.moments.mean.dtype == torch.float32
        return replace(self, products=torch.float32) if single else self

    def weigh(self, change: Tensor) -> Tensor:
        """Return S V in float64."""
        metric = self.metric
        if metric is None:
            return change
        damping = metric.damping.double()
        if not metric.full:
            return (metric.average.double() + damping)[:, None] * change
        product = times(double(metric.average), len(damping), change, self.products)
        return torch.addcmul(product, damping[:, None], change)

    @cached_property
    def pull(self) -> Tensor | None:
        """W A - B = W E[(x* - x) x*^T] in float64; None when it is zero."""
        drift, original = self.moments.drift, double(self.weight)
        if drift is None:
            return None
        pull = torch.empty_like(self.weight, dtype=torch.float64)
        lag = _rows_by(lambda rows: original(rows, ALL) @ drift.mean.double(), len(self.weight))
        for columns in _blocks(self.moments.width):
            product = times(original, len(self.weight), drift.cross[:, columns].double(), self.products)
            pull[:, columns] = torch.addr(product, lag, self.moments.mean[columns].double())
        return pull

    @cached_property
    def at_zero(self) -> tuple[float, float]:
        """E|W x|^2 (in the metric), and tr(S W D W^T)."""
        return self.measured(self.weight.new_zeros(()).expand_as(self.weight))

    def measured(self, weight: Tensor) -> tuple[float, float]:
        """Return E|V x* - W x|^2 in the metric and tr(S (V - W) D (V - W)^T), neither below zero."""
        error, ridge = self._terms(weight)
        return max(error, 0.0), max(ridge, 0.0)

    def total(self, weight: Tensor) -> float:
        """Return the sum of the two terms of `measured`, not below zero.

        Rounding of the moments may make the first of them negative, as much as the second is positive.
        """
        return max(sum(self._terms(weight)), 0.0)

    def _terms(self, weight: Tensor) -> tuple[float, float]:
        """Return the two terms of `measured`, the first formed as E|(V - W) x* + W d|^2, as the moments have them."""

        def change(rows: slice, columns: slice) -> Tensor:
            return weight[rows, columns].double() - self.weight[rows, columns].double()

        error, drifted, ridge = self._products(change, self.moments.covariance, self.moments.mean)
        if self.pull is not None:
            error += 2 * drifted + self.error_at_weight
        return error, ridge

    @cached_property
    def error_at_weight(self) -> float:
        """E|W x* - W x|^2 (in the metric)."""
        drift = self.moments.drift
        return 0.0 if drift is None else self._products(double(self.weight), drift.covariance, drift.mean)[0]

    def measuring_error(self, weight: Tensor) -> float:
        """Return a proven bound of the rounding error of `total`, for the numbers as stored.

        It holds where their exact total is not negative, as it is wherever a lower bound above zero was proved.

        Each term passes through additions over inputs, over outputs and over a block of columns.
        """
        out, width = self.weight.shape
        share = gamma(out * BLOCK + 2 * (out + width) + 32)
        if self.products != torch.float64:
            single = gamma(BLOCK + 2, torch.finfo(self.products).eps / 2)
            share += (1 + single) ** 2 - 1
        metric = self.metric
        positive = replace(self, metric=None if metric is None else replace(metric, average=metric.average.abs()))

        def spread(columns: slice) -> Tensor:
            size = self.moments.covariance[:, columns].double().abs()
            size.addr_(self.moments.mean.double().abs(), self.moments.mean[columns].double().abs())
            size[columns].diagonal().add_(self.damping[columns].double())
            return size

        # The sizes are those of the difference, which is rounded once.
        terms = positive.size(weight.double() - self.weight.double(), spread)
        if self.moments.drift is not None:
            change = absolute_product(weight.double() - self.weight.double(), known_size(self.moments, self.damping))
            pull, old = self.pull_sizes
            both = positive.weigh(pull[:, None])[:, 0]
            terms += 2 * float((both * change).sum()) + float((positive.weigh(old[:, None])[:, 0] * old).sum())
        return share * terms

    @cached_property
    def pull_sizes(self) -> tuple[Tensor, Tensor]:
        """Two sizes p, q [out] with |W A - B|_oj at most p_o s_j, s_j^2 = E[x*_j^2] + D_j, and |W| |E[d d^T]| |W|^T at
        most q q^T, entry by entry, before anything cancels.
        """
        drift = self.moments.drift
        if drift is None:
            nothing = torch.zeros_like(self.weight[:, 0], dtype=torch.float64)
            return nothing, nothing
        apart = known_size(replace(self.moments, covariance=drift.covariance, mean=drift.mean, drift=None))
        size = absolute_product(self.weight, apart)
        cross = torch.addr(drift.cross.double().abs(), drift.mean.double().abs(), self.moments.mean.double().abs())
        lag = _largest_ratio(cross, apart, known_size(self.moments))
        spread = torch.addr(drift.covariance.double().abs(), drift.mean.double().abs(), drift.mean.double().abs())
        return OUTWARD * lag * size, OUTWARD * _largest_ratio(spread, apart, apart) ** 0.5 * size

    def _products(self, part: Part, covariance: Tensor, mean: Tensor) -> tuple[float, float, float]:
        """Return tr(S V E[z z^T] V^T) for a z of the given covariance and mean, tr(S V (W A - B)^T) and tr(S V D V^T).

        S and the covariance are symmetric: of the two products of a pair of blocks one is formed, and counted twice.
        """
        out = len(self.weight)
        sums = torch.zeros(3, dtype=torch.float64, device=mean.device)
        means = torch.zeros(2, out, dtype=torch.float64, device=mean.device)
        for columns in _blocks(self.moments.width):
            block, average = part(ALL, columns), mean[columns].double()
            weighed = self.weigh(block)
            spread = covariance[: columns.stop, columns].to(torch.float64, copy=True)
            spread[: columns.start] *= 2
            sums[0] += times(part, out, spread, self.products).mul_(weighed).sum()
            means += torch.stack([block @ average, weighed @ average])
            if self.pull is not None:
                sums[1] += (weighed * self.pull[:, columns]).sum()
            sums[2] += (block * weighed).mul_(self.damping[columns].double()).sum()
        sums[0] += means[0] @ means[1]
        error, drifted, ridge = linalg.numbers(*sums)
        return error, drifted, ridge

    def residual(self, weight: Tensor) -> Tensor:
        """Return (V - W) A + (W A - B) in float64, from the numbers that the loss is measured from."""

        def change(rows: slice, columns: slice) -> Tensor:
            return weight[rows, columns].double() - self.weight[rows, columns].double()

        residual = torch.empty_like(weight, dtype=torch.float64)
        for columns in _blocks(self.moments.width):
            gram = gram_columns(self.moments, columns, torch.float64)
            gram[columns].diagonal().add_(self.damping[columns].double())
            residual[:, columns] = times(change, len(weight), gram, self.products)
        return residual if self.pull is None else residual.add_(self.pull)

    def size(self, weight: Tensor, spread: Callable[[slice], Tensor]) -> float:
        """Return tr(|S| |V| M |V|^T), where `spread` returns columns of M in float64."""

        def part(rows: slice, columns: slice) -> Tensor:
            return weight[rows, columns].abs().double()

        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for columns in _blocks(self.moments.width):
            product = times(part, len(weight), spread(columns), self.products)
            total += product.mul_(self.weigh(part(ALL, columns))).sum()
        return float(total)


@full_precision()
def pull_of(weight: Tensor, moments: InputMoments) -> Tensor | None:
    """Return W E[d x*^T], or None when x* = x."""
    drift = moments.drift
    return None if drift is None else torch.addr(weight @ drift.cross, weight @ drift.mean, moments.mean)


def known_size(moments: InputMoments, damping: Tensor | None = None) -> Tensor:
    """Return s_j = sqrt(E[x*_j^2] + D_j) in float64."""
    square = moments.covariance.diagonal().double() + moments.mean.double().square()
    return (square if damping is None else square + damping.double()).clamp(min=0).sqrt()


def _largest_ratio(entries: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Return the least r with |M_ij| <= r a_i b_j: about 1 for covariances, infinite where a size is 0."""
    sizes = torch.outer(rows, columns)
    ratios = torch.where(entries == 0, 0.0, entries / sizes)
    return float(ratios.max()) if ratios.numel() else 0.0


def double(matrix: Tensor) -> Part:
    """Return a function that returns parts of a matrix in float64."""
    return lambda rows, columns: matrix[rows, columns].double()


def absolute_product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return |V| x in float64."""
    return _rows_by(lambda rows: matrix[rows].abs().double() @ vector, len(matrix))


def times(part: Part, out: int, right: Tensor, products: torch.dtype = torch.float64) -> Tensor:
    """Return V R in float64 for a V of `out` rows, by float64 products or by float32 products of at most BLOCK terms.

    Where R has fewer rows than V has columns, the first columns of V are used.
    """
    if products == torch.float64:
        return _rows_by(lambda rows: part(rows, slice(len(right))) @ right, out)
    with full_precision():
        total = right.new_zeros(out, right.shape[1])
        # All rows at once: where products are fast, launching them takes most of the time.
        for terms in _blocks(len(right)):
            total += part(ALL, terms).to(products) @ right[terms].to(products)
        return total


def _rows_by(compute: Callable[[slice], Tensor], rows: int) -> Tensor:
    parts = [compute(block) for block in _blocks(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def gram_columns(moments: InputMoments, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
    """Return columns of E[x* x*^T], summed in the given dtype, by default that of the moments."""
    mean = moments.mean if dtype is None else moments.mean.to(dtype)
    return torch.addr(moments.covariance[:, columns].to(mean.dtype), mean, mean[columns])
