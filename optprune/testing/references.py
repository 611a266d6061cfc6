"""References: the optimum of small problems from the mathematics, by numpy, scipy and cvxpy, using no solver of ours.

A reference reads a problem's data and nothing else: the loss is rebuilt here from the moments. It needs scipy and
cvxpy (`pip install optprune[testing]`); without them the import fails, because a check that skips proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import cvxpy
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from optprune.problems import LayerLoss, LinkedLeastSquares, MaskedLeastSquares, Problem

Array = np.ndarray
MOST_CHOICES = 5000
"""enumerating more than this is no longer tiny"""


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
    """[samples, out]: W x for the x that go with them"""
    negligible: float
    """singular values of `inputs` below this are rounding of the moments"""
    uncentred: Array
    """A before means were taken out of it: its rounding stays in A"""
    epsilon: float
    """the unit of rounding of the dtype of the problem"""

    @classmethod
    def of(cls, loss: LayerLoss) -> "Quadratic":
        """Rebuild the loss from its weight, moments and damping."""
        weight, damping = _array(loss.weight), _array(loss.damping)
        gram, mean = _array(loss.moments.gram), _array(loss.moments.mean)
        width, unit, uncentred = len(mean), epsilon(loss), gram
        if loss.moments.dense is None:
            cross, ideal, ideal_mean = gram, gram, mean
            pair = lift = np.eye(width)
        else:
            cross, ideal = _array(loss.moments.dense.cross), _array(loss.moments.dense.gram)
            ideal_mean = _array(loss.moments.dense.mean)
            pair, lift = np.eye(2 * width)[:, :width], np.eye(2 * width)[:, width:]
        if loss.fit_bias:
            gram = gram - np.outer(mean, mean)
            cross = cross - np.outer(ideal_mean, mean)
            ideal = ideal - np.outer(ideal_mean, ideal_mean)
        joint = gram if loss.moments.dense is None else np.block([[gram, cross.T], [cross, ideal]])
        values, vectors = np.linalg.eigh(joint)
        # What the dtype of the moments cannot tell from zero.
        noise = len(joint) * unit * max(float(values[-1]), 0.0)
        tokens = np.sqrt(np.where(values > noise, values, 0))[:, None] * vectors.T
        return cls(
            weight,
            gram + np.diag(damping),
            weight @ cross + weight * damping,
            float(np.sum((weight @ ideal) * weight) + np.sum(weight**2 * damping)),
            damping,
            tokens @ pair,
            tokens @ lift @ weight.T,
            float(np.sqrt(noise)),
            uncentred + np.diag(damping),
            unit,
        )

    def value(self, weight: Array) -> float:
        """1/2 tr(V A V^T) - tr(V B^T) + c/2, literally."""
        return float(np.sum((weight @ self.gram) * weight) / 2 - np.sum(weight * self.target) + self.constant / 2)

    def terms(self, weight: Array) -> float:
        """The total size of the terms of the loss at V, before they cancel: what its rounding is relative to."""
        size, old = np.abs(weight), np.abs(self.weight)
        spread = np.abs(self.uncentred)
        return float(np.sum((size @ spread) * size) + np.sum((old @ spread) * old)) + abs(self.constant)


@dataclass(frozen=True)
class Reference:
    """The optimal objective of a problem, and how much of it is rounding."""

    optimum: float
    rounding: float


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def epsilon(loss: LayerLoss) -> float:
    """The unit of rounding of the dtype that a problem is given in."""
    return torch.finfo(loss.moments.gram.dtype).eps


def rounding(loss: LayerLoss, weight: Tensor) -> float:
    """How much of the loss of a weight [out, in] may be rounding of the moments and of the sums over them."""
    return _rounding(Quadratic.of(loss), _array(weight))


def _rounding(quadratic: Quadratic, weight: Array) -> float:
    # One rounding for each term of a sum over the inputs, and a few for collecting, centring and damping.
    return (len(quadratic.damping) + 4) * quadratic.epsilon * quadratic.terms(weight)


def least_squares(problem: MaskedLeastSquares) -> Reference:
    """Optimum of a restoration problem, row by row, as ordinary least squares on synthetic tokens.

    A row v with mask M minimises |X*_M v_M - X w|^2 + |D_M^(1/2) (v_M - w_M)|^2: the ridge is more rows of data.
    The returned optimum is the loss of a feasible weight, so an inaccurate optimiser makes it larger, by the square.
    """
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape)
    return _reference(quadratic, _restored(quadratic, mask))


def _restored(quadratic: Quadratic, mask: Array) -> Array:
    """The best weight [out, in] on a mask [out, in]."""
    answer = np.zeros_like(quadratic.weight)
    ridge = np.diag(np.sqrt(quadratic.damping))
    for pattern in np.unique(mask, axis=0):
        rows = (mask == pattern).all(1)
        if not pattern.any():
            continue
        data = np.vstack([quadratic.inputs[:, pattern], ridge[:, pattern]])
        right = np.vstack([quadratic.outputs[:, rows], ridge @ (quadratic.weight[rows] * pattern).T])
        largest = np.linalg.norm(data, 2)
        if largest > 0:
            found = scipy.linalg.lstsq(data, right, cond=quadratic.negligible / largest)
            answer[np.ix_(rows, pattern)] = np.transpose(found[0])  # pyright: ignore[reportOptionalSubscript]
    return answer


def convex_optimum(problem: MaskedLeastSquares) -> float:
    """Optimum of a restoration problem by an interior-point method (cvxpy with Clarabel)."""
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape).astype(float)
    # Solved in units of its own scale, where Clarabel's absolute tolerances mean something.
    scale = quadratic.terms(quadratic.weight)
    unit = np.sqrt(scale) if scale > 0 else 1.0
    weight = cvxpy.Variable(quadratic.weight.shape)
    kept = cvxpy.multiply(mask, weight)
    error = (quadratic.inputs @ kept.T - quadratic.outputs) / unit
    ridge = cvxpy.multiply(np.sqrt(quadratic.damping)[None] / unit, kept - quadratic.weight)
    program = cvxpy.Problem(cvxpy.Minimize((cvxpy.sum_squares(error) + cvxpy.sum_squares(ridge)) / 2))
    program.solve(solver=cvxpy.CLARABEL)
    if program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"Clarabel stopped with status {program.status}")
    return float(program.value) * unit**2  # pyright: ignore[reportArgumentType]


def exhaustive(problem: LinkedLeastSquares) -> Reference:
    """Optimum of a linked problem: every admissible choice of units, each restored by least squares."""
    quadratic = Quadratic.of(problem.loss)
    columns, slots = problem.link.columns.cpu().numpy(), problem.link.slots.cpu().numpy()
    names = np.unique(slots)
    each = [list(combinations(np.flatnonzero(slots == slot), problem.keep // len(names))) for slot in names]
    count = int(np.prod([len(choices) for choices in each]))
    if count > MOST_CHOICES:
        raise ValueError(f"{count} choices of units are too many to list: the reference is for at most {MOST_CHOICES}")
    answers = []
    for choice in product(*each):
        mask = np.ones(quadratic.weight.shape, dtype=bool)
        mask[:, columns.reshape(-1)] = False
        mask[:, columns[[unit for part in choice for unit in part]].reshape(-1)] = True
        answers.append(_restored(quadratic, mask))
    return _reference(quadratic, min(answers, key=quadratic.value))


def _reference(quadratic: Quadratic, answer: Array) -> Reference:
    return Reference(quadratic.value(answer), _rounding(quadratic, answer))


REFERENCES: dict[type[Problem], Callable[..., Reference]] = {
    MaskedLeastSquares: least_squares,
    LinkedLeastSquares: exhaustive,
}
"""for each concrete kind of problem a function that finds its optimum"""


@lru_cache(maxsize=64)
def reference(problem: Problem) -> Reference:
    """The optimum of a small problem, found without any solver of optprune, and how much of it is rounding.

    Remembered for the problem object, because every law asks for it again.
    """
    if type(problem) not in REFERENCES:
        raise TypeError(f"no reference for {type(problem).__name__}: add one to optprune.testing.references.REFERENCES")
    return REFERENCES[type(problem)](problem)


def reference_optimum(problem: Problem) -> float:
    """The optimal objective of a small problem, found without any solver of optprune."""
    return reference(problem).optimum
