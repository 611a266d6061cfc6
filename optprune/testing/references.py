"""References: the optimum of small problems from the mathematics, by numpy, scipy and cvxpy, using no solver of ours.

A reference reads a problem's data and nothing else: the loss is rebuilt here from the moments. It needs scipy and
cvxpy, with SCIP for `mixed_integer` (`pip install optprune[testing]`); without them the import fails, because a check
that skips proves nothing.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import cvxpy
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from optprune.patterns import NM, RowWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import (
    LayerLoss,
    LinkedLeastSquares,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
    StructuredProblem,
)

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
        weight, damping = _array(loss.weight), _array(loss.damping)
        gram = _array(loss.moments.gram)
        width, unit, uncentred = len(gram), epsilon(loss), gram + np.diag(damping)
        metric = _metric(loss)
        if loss.moments.dense is None:
            cross, ideal = gram, gram
            pair = lift = np.eye(width)
        else:
            cross, ideal = _array(loss.moments.dense.cross), _array(loss.moments.dense.gram)
            pair, lift = np.eye(2 * width)[:, :width], np.eye(2 * width)[:, width:]
        if loss.fit_bias:
            # Kept centred, so centring adds no rounding of means that are large.
            gram = cross = ideal = _array(loss.moments.covariance)
            # Deviations of what is nearly constant are known to an eps of the means, their products to its square.
            uncentred = np.abs(gram) + unit * np.abs(uncentred) + np.diag(damping)
            if loss.moments.drift is not None:
                lag, square = _array(loss.moments.drift.cross), _array(loss.moments.drift.covariance)
                cross = gram - lag
                ideal = cross - lag.T + square
        joint = gram if loss.moments.dense is None else np.block([[gram, cross.T], [cross, ideal]])
        # Every entry is rounded to its own size, so inputs are compared in units of theirs.
        sizes = _root(np.diag(joint))
        values, vectors = np.linalg.eigh(joint / np.outer(sizes, sizes))
        # What the dtype of the moments cannot tell from zero: up to an eps an entry, and three where the means, their
        # product and the sum are rounded too; and what the decomposition cannot.
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
            _root(np.diag(gram) + damping),
            float(np.sqrt(noise)),
            uncentred,
            unit,
            metric,
        )

    def value(self, weight: Array) -> float:
        """1/2 tr(S V A V^T) - tr(S V B^T) + c/2, literally."""
        quadratic = self.metric @ (weight @ self.gram / 2 - self.target)
        return float(np.sum(quadratic * weight) + self.constant / 2)

    def row_values(self, weight: Array) -> Array:
        """The loss of each row, [out], up to a constant of the row, for an S without couplings."""
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
        """The total size of the terms of the loss at V, before they cancel: what its rounding is relative to."""
        # A broken solver may return one row for all: it is the laws that must say so.
        size, old = np.abs(np.broadcast_to(weight, self.weight.shape)), np.abs(self.weight)
        spread, metric = np.abs(self.uncentred), np.abs(self.metric)
        total = np.sum((size @ spread) * (metric @ size)) + np.sum((old @ spread) * (metric @ old))
        return float(total) + abs(self.constant)


@dataclass(frozen=True)
class Reference:
    """The optimal objective of a problem, and how much of it is rounding."""

    optimum: float
    rounding: float


def _root(sizes: Array) -> Array:
    """Square roots, 1 where that is 0."""
    return np.sqrt(np.where(sizes > 0, sizes, 1.0))


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def epsilon(loss: LayerLoss) -> float:
    """The unit of rounding of the dtype that a problem is given in."""
    return torch.finfo(loss.moments.gram.dtype).eps


def _metric(loss: LayerLoss) -> Array:
    if loss.metric is None:
        return np.eye(loss.weight.shape[0])
    average = _array(loss.metric.average)
    return (average if average.ndim == 2 else np.diag(average)) + np.diag(_array(loss.metric.damping))


def rounding(loss: LayerLoss, weight: Tensor) -> float:
    """How much of the loss of a weight [out, in] may be rounding of the moments and of the sums over them."""
    return _rounding(Quadratic.of(loss), _array(weight))


def _rounding(quadratic: Quadratic, weight: Array) -> float:
    # One rounding for each term of a sum over the inputs, and a few for collecting, centring and damping; the same for
    # the sums over outputs of a metric.
    outputs = len(quadratic.metric) + 4 if quadratic.coupled else 0
    return (len(quadratic.damping) + 4 + outputs) * quadratic.epsilon * quadratic.terms(weight)


def clearly_regular(loss: LayerLoss) -> bool:
    """Whether the least eigenvalue of A, in units of its inputs, stands clear of the rounding of its dtype."""
    quadratic = Quadratic.of(loss)
    unit = np.outer(quadratic.scale, quadratic.scale)
    values = np.linalg.eigvalsh(quadratic.gram / unit)
    # The rounding of every entry of a row.
    spread = float(np.abs(quadratic.uncentred / unit).sum(1).max())
    return bool(values[0] > 4 * len(values) * quadratic.epsilon * spread)


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
    if quadratic.coupled and not (mask == mask[:1]).all():
        return _restored_jointly(quadratic, mask)
    # A diagonal S only weighs the rows, and with one mask for all of them any S is a factor of the normal equations.
    answer = np.zeros_like(quadratic.weight)
    ridge = np.diag(np.sqrt(quadratic.damping))
    for pattern in np.unique(mask, axis=0):
        rows = (mask == pattern).all(1)
        if not pattern.any():
            continue
        data = np.vstack([quadratic.inputs, ridge])[:, pattern] / quadratic.scale[pattern]
        right = np.vstack([quadratic.outputs[:, rows], ridge @ (quadratic.weight[rows] * pattern).T])
        largest = np.linalg.norm(data, 2)
        if largest > 0:
            found = np.asarray(scipy.linalg.lstsq(data, right, cond=quadratic.negligible / largest)[0])  # pyright: ignore
            answer[np.ix_(rows, pattern)] = found.T / quadratic.scale[pattern]
    return answer


def _restored_jointly(quadratic: Quadratic, mask: Array) -> Array:
    """The best weight on a mask whose rows S couples: one least-squares problem in all entries, by Kronecker products.

    |R (V X*^T - W X^T)|^2 + |R (V - W) D^(1/2)|^2 with R^T R = S, row after row of V.
    """
    answer = np.zeros_like(quadratic.weight)
    if not mask.any():
        return answer
    ridge, root, outputs = np.diag(np.sqrt(quadratic.damping)), quadratic.root, _root(np.diag(quadratic.metric))
    wanted = np.vstack([quadratic.outputs, ridge @ quadratic.weight.T])
    right = (root @ wanted.T).reshape(-1)
    root, tokens = root / outputs, np.vstack([quadratic.inputs, ridge]) / quadratic.scale
    data = np.kron(root, tokens)[:, mask.reshape(-1)]
    # Singular values of a Kronecker product are products: rounding in one factor is weighed by the other.
    noise = quadratic.negligible * np.linalg.norm(root, 2)
    noise += np.sqrt(len(root) * quadratic.epsilon) * np.linalg.norm(root, 2) * np.linalg.norm(tokens, 2)
    largest = np.linalg.norm(data, 2)
    if largest > 0:
        found = np.asarray(scipy.linalg.lstsq(data, right, cond=min(noise / largest, 1.0))[0])  # pyright: ignore
        answer[mask] = found / np.outer(outputs, quadratic.scale)[mask]
    return answer


def convex_optimum(problem: MaskedLeastSquares) -> float:
    """Optimum of a restoration problem by an interior-point method (cvxpy with Clarabel)."""
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape).astype(float)
    # Solved in units of its own scale, where Clarabel's absolute tolerances mean something.
    scale = quadratic.terms(quadratic.weight)
    unit = np.sqrt(scale) if scale > 0 else 1.0
    weight = cvxpy.Variable(quadratic.weight.shape)
    program = cvxpy.Problem(cvxpy.Minimize(_program_loss(quadratic, cvxpy.multiply(mask, weight), unit)))
    program.solve(solver=cvxpy.CLARABEL)
    if program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"Clarabel stopped with status {program.status}")
    return float(program.value) * unit**2  # pyright: ignore[reportArgumentType]


def _program_loss(quadratic: Quadratic, weight: cvxpy.Expression, unit: float) -> cvxpy.Expression:
    """The loss of a weight [out, in] in units of unit^2, for cvxpy."""
    root = quadratic.root
    error = (quadratic.inputs @ weight.T - quadratic.outputs) @ root.T / unit
    ridge = cvxpy.multiply(np.sqrt(quadratic.damping)[None] / unit, root @ (weight - quadratic.weight))
    return (cvxpy.sum_squares(error) + cvxpy.sum_squares(ridge)) / 2


PENALISED_ACCURACY = 1e-8
"""relative accuracy of the reference for penalised problems: Clarabel is asked for ten times less"""


def penalised(problem: PenalisedLeastSquares) -> Reference:
    """Optimum of a penalised problem by an interior-point method (cvxpy with Clarabel), in units of its own size.

    The returned optimum is the objective of the weight that Clarabel found, measured literally.
    """
    quadratic, penalty = Quadratic.of(problem.loss), problem.penalty
    candidates = [quadratic.weight, np.zeros_like(quadratic.weight)]
    size = min(quadratic.value(weight) + penalty_value(penalty, weight) for weight in candidates)
    if size <= 0:
        return Reference(0.0, max(_rounding(quadratic, weight) for weight in candidates))
    # Sizes of weights vary too, and with the units of the inputs: the variable is the change from the original weight
    # in units of what makes up for the largest; for a dead input, of the largest there.
    alive, largest = np.diag(quadratic.gram) > 0, np.abs(quadratic.weight).max(0)
    made_up = float((largest * quadratic.scale)[alive].max(initial=0.0)) / quadratic.scale
    length = np.where(alive & (made_up > 0), made_up, np.where(largest > 0, largest, 1.0))
    change = cvxpy.Variable(quadratic.weight.shape)
    weight = quadratic.weight + cvxpy.multiply(np.broadcast_to(length, change.shape), change)
    objective = _program_loss(quadratic, weight, np.sqrt(size)) + penalty_expression(penalty, weight) / size
    program = cvxpy.Problem(cvxpy.Minimize(objective))
    tolerances = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
    tight = dict.fromkeys(tolerances, PENALISED_ACCURACY / 10)
    # What it may fall back to, with the status "inaccurate", is the accuracy that is stated here.
    tight |= {f"reduced_{name}": PENALISED_ACCURACY for name in tolerances}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
        program.solve(solver=cvxpy.CLARABEL, max_iter=500, **tight)
    if program.status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
        raise ArithmeticError(f"Clarabel stopped with status {program.status}")
    found = quadratic.weight + length * np.asarray(change.value)
    optimum = quadratic.value(found) + penalty_value(penalty, found)
    return Reference(optimum, _rounding(quadratic, found) + PENALISED_ACCURACY * optimum)


def penalty_value(penalty: Penalty, weight: Array) -> float:
    """P(V), literally."""
    match penalty:
        case L1(strength):
            return float(strength * np.abs(weight).sum())
        case WeightedL1(weights):
            return float((_array(weights) * np.abs(weight)).sum())
        case ElasticNet(strength, ridge):
            return float(strength * np.abs(weight).sum() + ridge / 2 * np.square(weight).sum())
        case ColumnGroups(strength):
            return float(strength * np.linalg.norm(weight, axis=0).sum())
    raise TypeError(f"no reference for the penalty {type(penalty).__name__}: add it to optprune.testing.references")


def penalty_expression(penalty: Penalty, weight: cvxpy.Expression) -> Any:
    """P(V), for cvxpy."""
    match penalty:
        case L1(strength):
            return strength * cvxpy.sum(cvxpy.abs(weight))
        case WeightedL1(weights):
            spread = np.broadcast_to(_array(weights), weight.shape)
            return cvxpy.sum(cvxpy.multiply(spread, cvxpy.abs(weight)))
        case ElasticNet(strength, ridge):
            return strength * cvxpy.sum(cvxpy.abs(weight)) + ridge / 2 * cvxpy.sum_squares(weight)
        case ColumnGroups(strength):
            return strength * cvxpy.sum(cvxpy.norm(weight, 2, axis=0))
    raise TypeError(f"no reference for the penalty {type(penalty).__name__}: add it to optprune.testing.references")


def exhaustive_entries(problem: SparseLeastSquares) -> Reference:
    """Optimum of a sparse problem: every mask of the pattern, each restored by least squares.

    The rows of a weight only meet in the pattern, so every subset of a row is restored once for all rows.
    """
    quadratic, pattern = Quadratic.of(problem.loss), problem.pattern
    rows, width = quadratic.weight.shape
    if 2 ** (rows * width) > MOST_CHOICES:
        raise ValueError(f"a [{rows}, {width}] weight has too many masks to list: the reference is for 12 entries")
    if quadratic.coupled:
        bits = (np.array(b, dtype=bool).reshape(rows, width) for b in product((False, True), repeat=rows * width))
        masks = [mask for mask in bits if pattern.admits(torch.tensor(mask))]
        return _reference(quadratic, min((_restored(quadratic, mask) for mask in masks), key=quadratic.value))
    subsets = [np.array(bits, dtype=bool) for bits in product((False, True), repeat=width)]
    answers = [_restored(quadratic, np.broadcast_to(subset, (rows, width))) for subset in subsets]
    losses = np.array([quadratic.row_values(answer) for answer in answers])
    counts = np.array([subset.sum() for subset in subsets])
    match pattern:
        case RowWise(keep):
            choice = [np.where(counts == keep, losses[:, row], np.inf).argmin() for row in range(rows)]
        case NM(n, m):
            fits = np.array([(subset.reshape(-1, m).sum(1) == n).all() for subset in subsets])
            choice = [np.where(fits, losses[:, row], np.inf).argmin() for row in range(rows)]
        case Unstructured(keep):
            # The best subset of every count in every row, then every way to share the count out.
            best = [
                [np.where(counts == k, losses[:, row], np.inf).argmin() for k in range(width + 1)]
                for row in range(rows)
            ]
            shares = (share for share in product(range(width + 1), repeat=rows) if sum(share) == keep)
            choices = ([best[row][k] for row, k in enumerate(share)] for share in shares)
            choice = min(choices, key=lambda picked: sum(losses[i, row] for row, i in enumerate(picked)))
        case _:
            admitted = (
                picked
                for picked in product(range(len(subsets)), repeat=rows)
                if pattern.admits(torch.tensor(np.array([subsets[i] for i in picked])))
            )
            choice = min(admitted, key=lambda picked: sum(losses[i, row] for row, i in enumerate(picked)))
    return _reference(quadratic, np.array([answers[i][row] for row, i in enumerate(choice)]))


def exhaustive(problem: StructuredProblem) -> Reference:
    """Optimum of a structured or linked problem: every admissible choice of units, each restored by least squares."""
    quadratic = Quadratic.of(problem.loss)
    columns, slots = problem.channels.columns.cpu().numpy(), problem.channels.slots.cpu().numpy()
    names = np.unique(slots)
    each = [list(combinations(np.flatnonzero(slots == slot), problem.keep // len(names))) for slot in names]
    count = int(np.prod([len(choices) for choices in each]))
    if count > MOST_CHOICES:
        raise ValueError(f"{count} choices of units are too many to list: the reference is for at most {MOST_CHOICES}")
    answers = []
    for choice in product(*each):
        kept = np.isin(np.arange(len(slots)), [unit for part in choice for unit in part])
        answers.append(_restored(quadratic, _mask_of(quadratic, columns, kept)))
    return _reference(quadratic, min(answers, key=quadratic.value))


SCIP_ACCURACY = 1e-5
"""relative accuracy of the mixed-integer reference: SCIP holds constraints to 1e-6"""


def mixed_integer(problem: StructuredProblem) -> Reference:
    """Optimum of a structured problem as a mixed-integer second-order-cone program (cvxpy with SCIP).

    |V_c - (V0)_c| <= sqrt(2 (f(start) - f(V0)) (A^-1)_cc) entry by entry for every V as good as some feasible start,
    which gives valid big-M bounds |V_c| <= M_c z; A must be positive definite. About ten units take a second.
    The returned optimum is the loss of the chosen units restored by least squares, so it is never too low.
    """
    quadratic = Quadratic.of(problem.loss)
    columns, slots = problem.channels.columns.cpu().numpy(), problem.channels.slots.cpu().numpy()
    inverse = np.linalg.inv(quadratic.gram)
    minimiser = quadratic.target @ inverse
    first = _mask_of(quadratic, columns, np.isin(np.arange(len(slots)), _first_of_every_slot(problem, slots)))
    spread = max(quadratic.value(_restored(quadratic, first)) - quadratic.value(minimiser), 0.0)
    most = np.abs(minimiser) + np.sqrt(2 * spread * np.diag(inverse)) * (1 + 1e-9)
    keep = cvxpy.Variable(len(columns), boolean=True)
    weight = cvxpy.Variable(quadratic.weight.shape)
    bounds = [
        cvxpy.abs(weight[:, column]) <= most[:, column] * keep[unit]
        for unit, group in enumerate(columns)
        for column in group
    ]
    counts: list[Any] = [
        cvxpy.sum(keep[slots == slot]) == problem.keep // len(np.unique(slots)) for slot in np.unique(slots)
    ]
    # In units of its own scale, where the absolute tolerances of SCIP mean something.
    unit = np.sqrt(max(spread, 1e-300))
    program = cvxpy.Problem(cvxpy.Minimize(_program_loss(quadratic, weight, unit)), [*bounds, *counts])
    program.solve(solver=cvxpy.SCIP)
    if program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"SCIP stopped with status {program.status}")
    answer = _restored(quadratic, _mask_of(quadratic, columns, np.asarray(keep.value) > 0.5))
    found = _reference(quadratic, answer)
    return Reference(found.optimum, found.rounding + SCIP_ACCURACY * spread)


def _first_of_every_slot(problem: StructuredProblem, slots: Array) -> Array:
    each = problem.keep // len(np.unique(slots))
    return np.concatenate([np.flatnonzero(slots == slot)[:each] for slot in np.unique(slots)])


def _mask_of(quadratic: Quadratic, columns: Array, kept: Array) -> Array:
    """The mask [out, in] of the kept units; columns of no unit stay."""
    mask = np.ones(quadratic.weight.shape, dtype=bool)
    mask[:, columns[~kept].reshape(-1)] = False
    return mask


def _reference(quadratic: Quadratic, answer: Array) -> Reference:
    return Reference(quadratic.value(answer), _rounding(quadratic, answer))


REFERENCES: dict[type[Problem], Callable[..., Reference]] = {
    MaskedLeastSquares: least_squares,
    LinkedLeastSquares: exhaustive,
    PenalisedLeastSquares: penalised,
    SparseLeastSquares: exhaustive_entries,
    StructuredLeastSquares: exhaustive,
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
