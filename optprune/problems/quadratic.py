"""The loss of a problem as NumPy arrays in float64, rebuilt from its data, for programs of other solvers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optprune.problems.loss import LayerLoss

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss 1/2 tr(V A V^T) - tr(V B^T) + c/2 as arrays, and tokens x*, x that have the same moments."""

    weight: Array
    gram: Array
    target: Array
    constant: float
    damping: Array
    inputs: Array
    """[samples, in]: synthetic x* with inputs^T inputs = E[x* x*^T]"""
    outputs: Array
    """[samples, out]: W x for the x of the same tokens"""
    scale: Array
    """[in]: the root of the diagonal of A, 1 where it is 0; A_ij is rounded to a share of s_i s_j"""
    negligible: float
    """singular values of `inputs / scale` below this are rounding of the moments"""
    uncentred: Array
    """the sizes that the rounding of A is relative to: its entries, and an eps of those before means were taken out"""
    epsilon: float
    """the unit of rounding of the dtype of the problem"""
    metric: Array
    """[out, out]: S, the identity where there is none"""

    @classmethod
    def of(cls, loss: LayerLoss) -> "Quadratic":
        """Rebuild the loss from its weight, moments and damping."""
        weight, damping = array(loss.weight), array(loss.damping)
        gram = array(loss.moments.gram)
        width, unit, uncentred = len(gram), epsilon(loss), gram + np.diag(damping)
        metric = _metric(loss)
        if loss.moments.dense is None:
            cross, ideal = gram, gram
            pair = lift = np.eye(width)
        else:
            cross, ideal = array(loss.moments.dense.cross), array(loss.moments.dense.gram)
            pair, lift = np.eye(2 * width)[:, :width], np.eye(2 * width)[:, width:]
        if loss.fit_bias:
            # Already centred, so centring adds no rounding of large means.
            gram = cross = ideal = array(loss.moments.covariance)
            # Deviations of a nearly constant input are known to an eps of its mean, their products to its square.
            uncentred = np.abs(gram) + unit * np.abs(uncentred) + np.diag(damping)
            if loss.moments.drift is not None:
                lag, square = array(loss.moments.drift.cross), array(loss.moments.drift.covariance)
                cross = gram - lag
                ideal = cross - lag.T + square
        joint = gram if loss.moments.dense is None else np.block([[gram, cross.T], [cross, ideal]])
        # Every entry is rounded relative to its size, so inputs are compared in units of their own size.
        sizes = roots(np.diag(joint))
        values, vectors = np.linalg.eigh(joint / np.outer(sizes, sizes))
        # Eigenvalues within the rounding of the moments, an eps per entry, or three where the means, their
        # product and the sum are rounded too, and within the rounding of the decomposition.
        entry = unit * (1 if loss.fit_bias else 3)
        noise = len(joint) * (entry + np.finfo(float).eps * max(float(values[-1]), 0.0))
        tokens = np.sqrt(np.where(values > noise, values, 0))[:, None] * vectors.T * sizes
        return cls(
            weight,
            gram + np.diag(damping),
            weight @ cross + weight * damping,
            float(np.sum((weight @ ideal) * (metric @ weight)) + np.sum(weight * (metric @ weight) * damping)),
            damping,
            tokens @ pair,
            tokens @ lift @ weight.T,
            roots(np.diag(gram) + damping),
            float(np.sqrt(noise)),
            uncentred,
            unit,
            metric,
        )

    def value(self, weight: Array) -> float:
        """Return 1/2 tr(S V A V^T) - tr(S V B^T) + c/2, by the formula."""
        quadratic = self.metric @ (weight @ self.gram / 2 - self.target)
        return float(np.sum(quadratic * weight) + self.constant / 2)

    def row_values(self, weight: Array) -> Array:
        """Return the loss of each row, [out], up to a constant of the row, for a diagonal S."""
        rows = np.sum((weight @ self.gram) * weight, 1) / 2 - np.sum(weight * self.target, 1)
        return np.diagonal(self.metric) * rows

    @property
    def coupled(self) -> bool:
        """Whether S is not diagonal."""
        return bool((self.metric != np.diag(np.diagonal(self.metric))).any())

    @property
    def root(self) -> Array:
        """[out, out]: R with R^T R = S."""
        values, vectors = np.linalg.eigh(self.metric)
        return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T

    def terms(self, weight: Array) -> float:
        """Return the total size of the terms of the loss at V, before they cancel: its rounding is relative to it."""
        # A broken solver may return one row for all; the laws report that.
        size, old = np.abs(np.broadcast_to(weight, self.weight.shape)), np.abs(self.weight)
        spread, metric = np.abs(self.uncentred), np.abs(self.metric)
        total = np.sum((size @ spread) * (metric @ size)) + np.sum((old @ spread) * (metric @ old))
        return float(total) + abs(self.constant)

    def rounding(self, weight: Array) -> float:
        """Return the part of the loss at V [out, in] that may be rounding of the moments and of sums over them."""
        # One rounding for each term of a sum over the inputs, and a few for collecting, centring and damping; the same
        # for the sums over outputs of a metric.
        outputs = len(self.metric) + 4 if self.coupled else 0
        return (len(self.damping) + 4 + outputs) * self.epsilon * self.terms(weight)


def roots(sizes: Array) -> Array:
    """Return the square roots, with 1 in place of 0."""
    return np.sqrt(np.where(sizes > 0, sizes, 1.0))


def array(tensor: Tensor) -> Array:
    """Return a copy of a tensor as a float64 array."""
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def epsilon(loss: LayerLoss) -> float:
    """Return the unit of rounding of a problem's dtype."""
    return torch.finfo(loss.moments.gram.dtype).eps


def _metric(loss: LayerLoss) -> Array:
    if loss.metric is None:
        return np.eye(loss.weight.shape[0])
    average = array(loss.metric.average)
    return (average if average.ndim == 2 else np.diag(average)) + np.diag(array(loss.metric.damping))
