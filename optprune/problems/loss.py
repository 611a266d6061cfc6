"""The loss of all layer problems: the mean squared change of a layer's output, as a quadratic of its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError, check_kind
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.numerics.fingerprint import fingerprint
from optprune.numerics.precision import excess, full_precision
from optprune.numerics.tensors import all_finite, check_floats, check_real
from optprune.problems.exact import ExactLoss, absolute_product, gram_columns, pull_of

MODERATE_INPUTS, MODERATE_WEIGHTS = 12, 24
"""exponents of two: between sizes of 2^-k and 2^k the squares of gradients stay in the range of float32"""


def _check_moments(moments: InputMoments) -> None:
    check_kind("the moments", moments, InputMoments, "make them by InputMoments.from_samples or from_averages")


@dataclass(frozen=True, eq=False)
class LayerLoss:
    r"""Half the mean squared output error per token of a linear layer, plus a ridge towards its original weight.

        f(V) = 1/2 E|V x* - W x|^2 + 1/2 tr((V - W) D (V - W)^T)
             = 1/2 tr(V A V^T) - tr(V B^T) + c/2

        A = E[x* x*^T] + D    B = W E[x x*^T] + W D    c = E|W x|^2 + tr(W D W^T)

    With an output metric S [out, out] every square of outputs is e^T S e in place of |e|^2, which makes it

        f(V) = 1/2 tr(S V A V^T) - tr(S V B^T) + c/2,   gradient S (V A - B),   Hessian S (x) A.

    W [out, in] is the original weight, x the dense input, x* the input the layer will really get, D the damping
    (a nonnegative diagonal), and averages are over calibration tokens. The unit is (output activation)^2 per token.
    With `fit_bias` the layer's bias is free too: moments are then centred, and `bias_change` gives the bias that
    goes with a V. Convex in V, strictly where A (and S) is positive definite. With the metric of `metric.py` the unit
    is nats per token, so costs compare between layers. A diagonal S only scales rows, and `solve` undoes that, so
    solvers meet at most an S with a unit diagonal (`row_scaled`), and none at all where whole columns go (`whitened`).

    Reference: the layer-wise objective of Optimal Brain Surgeon (Hassibi and Stork, 1992) as used by SparseGPT; the
    Kronecker-factored Fisher information of K-FAC (Martens and Grosse, 2015).
    """

    weight: Float[Tensor, "out in"]
    moments: InputMoments
    damping: Float[Tensor, " in"]
    """the diagonal of D"""
    fit_bias: bool = False
    metric: OutputMetric | None = None
    """S; None is the identity"""

    def __post_init__(self) -> None:
        _check_moments(self.moments)
        check_floats("the weight", self.weight, ("out", "in"), self.moments.mean)
        check_floats("the damping", self.damping, ("in",), self.moments.mean)
        width = self.weight.shape[1]
        if self.moments.width != width or self.damping.shape != (width,):
            raise InputError(
                f"a weight with {width} inputs needs moments and a damping of that width, "
                f"not {self.moments.width} and {tuple(self.damping.shape)}"
            )
        if not all_finite(self.weight):
            raise InputError("the weight holds NaN or infinity: the model is damaged, load it again from its source")
        if not bool(((self.damping >= 0) & torch.isfinite(self.damping)).all()):
            raise InputError(
                f"damping must be finite and not negative, but its least entry is {self.damping.min().item():.3g} "
                f"and its largest {self.damping.max().item():.3g}"
            )
        self.moments.check()
        if self.metric is not None:
            if self.metric.width != self.weight.shape[0]:
                raise InputError(
                    f"a weight with {self.weight.shape[0]} outputs needs a metric of that width, "
                    f"not {self.metric.width}"
                )
            self.metric.check()

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "out in"],
        moments: InputMoments,
        damping: float = 0.0,
        *,
        fit_bias: bool = False,
        metric: OutputMetric | None = None,
    ) -> "LayerLoss":
        """Return the loss of a weight in the moments' dtype, on their device, with damping x mean(diag Gram) as D."""
        _check_moments(moments)
        check_real("the weight", weight, ("out", "in"))
        # A copy, because later writes to the model must not change the problem.
        own = weight.detach().to(moments.mean, copy=True)
        if metric is not None:
            metric = metric.to(own.dtype).to(own.device)
        return cls(own, moments, torch.zeros_like(moments.mean), fit_bias, metric).damped(damping)

    def damped(self, fraction: float) -> "LayerLoss":
        """Return the same loss with the damping D = fraction x mean(diag E[x* x*^T]) x I."""
        check_kind("the damping fraction", fraction, Real, "give a number, e.g. 0.01")
        if not 0 <= fraction < math.inf:
            raise InputError(f"the damping fraction must be finite and not negative, not {fraction}")
        level = fraction * self._statistics.mean_square.mean()
        return replace(self, damping=torch.full_like(self.damping, float(level)))

    @classmethod
    def mixture(cls, losses: "Sequence[LayerLoss]", shares: Sequence[float]) -> "LayerLoss":
        """Return sum_k p_k f_k for losses of one weight on several texts, with the shares p scaled to a sum of one.

        Exact: the moments are averages, and so are their mixtures. Where the bias is fitted, one bias serves all texts.
        InputError where the weights, the metrics or `fit_bias` differ, or a share is not positive.
        """
        if not losses:
            raise InputError("a mixture of no losses cannot be formed: give at least one")
        first, total = losses[0], sum(shares)
        if len(losses) != len(shares) or not all(0 < share < math.inf for share in shares):
            raise InputError(f"{len(losses)} losses need as many shares above zero, not {list(shares)}")
        for loss in losses[1:]:
            if not torch.equal(loss.weight, first.weight):
                raise InputError("the losses of a mixture must be of one weight: theirs differ")
            if fingerprint(loss.metric) != fingerprint(first.metric) or loss.fit_bias != first.fit_bias:
                raise InputError("the losses of a mixture must have the same metric and `fit_bias`: theirs differ")
        moments, damping, sofar = first.moments, first.damping * (shares[0] / total), shares[0]
        for loss, share in zip(losses[1:], shares[1:], strict=True):
            sofar += share
            moments = moments.mixed(loss.moments, share / sofar)
            damping = damping + loss.damping * (share / total)
        return replace(first, moments=moments, damping=damping)

    @cached_property
    def _statistics(self) -> InputMoments:
        return self.moments.centred() if self.fit_bias else self.moments

    # -- the output metric

    @property
    def coupled(self) -> bool:
        """Whether rows depend on each other: the metric is a matrix, not only a diagonal."""
        return self.metric is not None and self.metric.full

    def weigh(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return S V in the dtype of V."""
        return change if self.metric is None else self.metric.to(change.dtype).apply(change)

    def row_scaled(self) -> "LayerLoss":
        """Return the loss as a function of diag(sqrt(S_ii)) V: S gets a unit diagonal; a diagonal S disappears."""
        metric = self.metric
        if metric is None:
            return self
        return replace(self, weight=metric.row_scale[:, None] * self.weight, metric=metric.row_scaled())

    def whitened(self) -> "LayerLoss":
        """Return the loss as a function of S^(1/2) V, without a metric. Only zeros of whole columns stay zeros."""
        metric = self.metric
        if metric is None or not metric.full:
            return self.row_scaled()
        return replace(self, weight=metric.whitening.into(self.weight), metric=None)

    @property
    def plain(self) -> "LayerLoss":
        """The loss without its metric."""
        # A cached reference to itself would keep the loss and its moments alive until a garbage collection.
        return self if self.metric is None else self._without_metric

    @cached_property
    def _without_metric(self) -> "LayerLoss":
        return replace(self, metric=None)

    @property
    def dead(self) -> bool:
        """Whether A is zero: every weight costs the same."""
        return not bool(self._statistics.covariance.any() or self._statistics.mean.any() or self.damping.any())

    def in_moderate_units(self, *, of_weights: bool = True) -> "tuple[LayerLoss, float, float]":
        """Return the loss in units of weights and inputs in which no square leaves the range of float32.

        Also return the factors of the weights and of f. They are powers of two, so nothing is rounded. Unless its
        numbers are extreme, the loss is returned unchanged. The unit of weights may have to stay (not `of_weights`).
        """
        size = float(self._statistics.mean_square.double().mean()) ** 0.5
        dtype = self.weight.dtype
        inputs, weights = excess(size, MODERATE_INPUTS, dtype), 1.0
        if of_weights:
            weights = excess(float(self.weight.abs().max()), MODERATE_WEIGHTS, dtype)
        if inputs == weights == 1:
            return self, 1.0, 1.0
        moments = self.moments if inputs == 1 else self.moments.times(inputs)
        loss = replace(self, weight=self.weight * weights, moments=moments, damping=self.damping * inputs * inputs)
        return loss, weights, (inputs * weights) ** -2

    # -- the quadratic, in the moments' dtype, for solvers

    @cached_property
    def gram(self) -> Float[Tensor, "in in"]:
        """A = E[x* x*^T] + D (centred when the bias is fitted)."""
        gram = self._statistics.gram
        gram.diagonal().add_(self.damping)
        return gram

    @cached_property
    def pull(self) -> Float[Tensor, "out in"] | None:
        """W A - B = W E[(x* - x) x*^T], the gradient at the original weight; None when it is zero (x* = x)."""
        return pull_of(self.weight, self._statistics)

    @cached_property
    @full_precision()
    def target(self) -> Float[Tensor, "out in"]:
        """B = W E[x x*^T] + W D."""
        plain = self.weight @ self.gram
        return plain if self.pull is None else plain - self.pull

    @cached_property
    def linear(self) -> Float[Tensor, "out in"]:
        """S B, the linear term of the loss: minus its gradient at zero."""
        return self.weigh(self.target)

    def residual(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return V A - B, formed from V - W so that nothing cancels near the original weight."""
        residual = (weight - self.weight) @ self.gram
        return residual if self.pull is None else residual + self.pull

    def gradient(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return S (V A - B)."""
        return self.weigh(self.residual(weight))

    # -- the rounding of A and f

    @cached_property
    def input_scale(self) -> Float[Tensor, " in"]:
        """s_j = sqrt(A_jj) in float64, 1 for dead inputs: an entry A_ij is known to a share of s_i s_j."""
        size = (self._statistics.mean_square.double() + self.damping.double()).sqrt()
        return torch.where(size > 0, size, 1.0)

    @property
    def entry_rounding(self) -> float:
        """The share of s_i s_j to which an entry of A is known, whatever the units of the inputs.

        Half an eps for the covariance and for adding the damping; unless the bias is fitted, for two means, their
        product and the sum as well.
        """
        return torch.finfo(self.moments.mean.dtype).eps * (1 if self.fit_bias else 3)

    @property
    def resolution(self) -> float:
        """What an eigenvalue of A_ij / (s_i s_j) is known to: the rounding of an entry times their number in a row."""
        return len(self.damping) * self.entry_rounding

    def residual_rounding(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Return the part of (V A - B)_j / s_j, for any j, that may be rounding of the moments.

        The rounding of an entry times sum_i |V_i| s_i + |W_i| (s_i + t_i), t_i = s_i + sqrt(E[(x* - x)_i^2]) at least
        sqrt(E[x_i^2]): those of V A, of W A and of W E[x x*^T].
        """
        drift, size = self._statistics.drift, self.input_scale
        ideal = size
        if drift is not None:
            ideal = size + (drift.covariance.diagonal().double() + drift.mean.double().square()).sqrt()
        terms = absolute_product(weight, size) + absolute_product(self.weight, size + ideal)
        return self.entry_rounding * terms

    def rounding(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the part of f(V) that may be rounding: (in + 4) eps of the sizes of its terms, before they cancel.

        That is one rounding for each term of a sum over inputs, and a few for sums, means and damping; under a full
        output metric the same for the outputs.
        """
        unit = torch.finfo(self.moments.mean.dtype).eps
        statistics, moments = self._statistics, self.moments

        def spread(columns: slice) -> Tensor:
            size = gram_columns(statistics, columns).double().abs_()
            size[columns].diagonal().add_(self.damping[columns].double())
            if self.fit_bias:
                # Deviations of a nearly constant input are known to an eps of its mean, their products to its square.
                size += unit * gram_columns(moments, columns).double().abs_()
            return size

        metric = self.metric
        if metric is not None:
            metric = replace(metric, average=metric.average.abs())
        exact = replace(self._measuring, metric=metric)
        terms = sum(exact.size(size, spread) for size in (weight, self.weight))
        count = len(self.damping) + 4 + (len(self.weight) + 4 if self.coupled else 0)
        return count * unit * (terms + abs(self.constant))

    # -- measurements, in float64

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        """Return f(V) with its damping; off the CPU by float32 products where the moments are float32 (`ExactLoss`)."""
        return self._measuring.total(weight) / 2

    def exact_value(self, weight: Float[Tensor, "out in"]) -> float:
        """Return f(V) by float64 products on every device, for certificates."""
        return self.exact.total(weight) / 2

    def relative_error(self, weight: Float[Tensor, "out in"]) -> float:
        """Return E|V x* - W x|^2 / E|W x|^2 without damping and metric, of centred outputs if the bias is fitted."""
        return self.plain.weighed_error(weight)

    def weighed_error(self, weight: Float[Tensor, "out in"]) -> float:
        """Return E|V x* - W x|^2 / E|W x|^2 in the metric, without damping."""
        error, scale = self._measuring.measured(weight)[0], self.signal
        return error / scale if scale > 0 else float(error > 0)

    @property
    def signal(self) -> float:
        """E|W x|^2 in the metric, the denominator of the relative error."""
        return self._measuring.at_zero[0]

    @property
    def constant(self) -> float:
        """c = E|W x|^2 + tr(W D W^T)."""
        return sum(self._measuring.at_zero)

    def bias_change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Return W E[x] - V E[x*], the change of the layer's bias that leaves the mean output unchanged."""
        change = (self.weight - weight) @ self.moments.mean
        return change if self.moments.drift is None else change - self.weight @ self.moments.drift.mean

    def measuring_error(self, weight: Float[Tensor, "out in"]) -> float:
        """Return a proven bound of the rounding error of `value`, for the numbers as stored."""
        return self._measuring.measuring_error(weight) / 2

    @cached_property
    def exact(self) -> ExactLoss:
        """The loss by float64 products on every device."""
        return ExactLoss(self.weight, self._statistics, self.damping, self.metric)

    @cached_property
    def _measuring(self) -> ExactLoss:
        return self.exact.fast


def loss_of_rows(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    moments: InputMoments,
    damping: float,
    metric: OutputMetric | None,
) -> LayerLoss:
    """Return the loss of a layer as a function of its transposed weight [in, out], whose columns are its outputs.

        f(V) = 1/2 tr(S (V - W) A (V - W)^T) = 1/2 tr(A (V - W)^T S (V - W))

    so the metric S of the outputs takes the place of the Gram matrix and A, that of the inputs, takes the place of the
    metric: problems whose units are columns, and their solvers, serve where units are rows. `damping` is that of A as a
    share of its mean diagonal. A bias is one more column of W, of an input that is always 1, and so the last row of the
    transposed weight. W is compared with itself on the inputs x* that the layer will get. Under a diagonal metric,
    and without one, which gives outputs a weight of 1, no row makes up for another.
    """
    gram, own = moments.gram, weight.detach().to(moments.mean)
    if bias is not None:
        mean = moments.mean[:, None]
        gram = torch.cat([torch.cat([gram, mean], 1), torch.cat([mean, torch.ones_like(mean[:1])]).T])
        own = torch.cat([own, bias.detach().to(own)[:, None]], 1)
    # Averages that were summed here need no check of definiteness, also with one more input.
    summed = moments.proved is moments.covariance
    inputs = OutputMetric(gram, torch.zeros_like(gram[0]), moments.tokens, gram if summed else None).damped(damping)
    ones, zeros = own.new_ones(len(own)), own.new_zeros(len(own))
    given = OutputMetric(ones, zeros, moments.tokens) if metric is None else metric.to(own.dtype).to(own.device)
    outputs = given.average if given.full else torch.diag(given.average)
    proved = outputs if given.proved is given.average else None
    squares = InputMoments(outputs, zeros, given.tokens, proved=proved)
    return LayerLoss(own.T.contiguous(), squares, given.damping, metric=inputs)
