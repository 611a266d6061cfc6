"""References for the convex kinds: least squares by scipy, penalised problems by an interior-point method of cvxpy."""

import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy
import numpy as np
import scipy.linalg

from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import MaskedLeastSquares, PenalisedLeastSquares
from optprune.testing.quadratic import Array, Quadratic, array, roots

PENALISED_ACCURACY = 1e-8
"""relative accuracy of the reference for penalised problems: Clarabel is asked for ten times less"""


@dataclass(frozen=True)
class Reference:
    """The optimal objective of a problem, and how much of it is rounding."""

    optimum: float
    rounding: float
    weight: Array | None = None
    """a feasible weight [out, in] that attains it, up to rounding"""


def least_squares(problem: MaskedLeastSquares) -> Reference:
    """Optimum of a restoration problem, row by row, as ordinary least squares on synthetic tokens.

    A row v with mask M minimises |X*_M v_M - X w|^2 + |D_M^(1/2) (v_M - w_M)|^2: the ridge is more rows of data.
    The returned optimum is the loss of a feasible weight, so an inaccurate optimiser makes it larger, by the square.
    """
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape)
    return of_weight(quadratic, restored(quadratic, mask))


def restored(quadratic: Quadratic, mask: Array) -> Array:
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
    ridge, root, outputs = np.diag(np.sqrt(quadratic.damping)), quadratic.root, roots(np.diag(quadratic.metric))
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


def of_weight(quadratic: Quadratic, answer: Array) -> Reference:
    """The objective of a weight as a reference."""
    return Reference(quadratic.value(answer), quadratic.rounding(answer), answer)


def convex_optimum(problem: MaskedLeastSquares) -> float:
    """Optimum of a restoration problem by an interior-point method (cvxpy with Clarabel)."""
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape).astype(float)
    # Solved in units of its own scale, where Clarabel's absolute tolerances mean something.
    scale = quadratic.terms(quadratic.weight)
    unit = np.sqrt(scale) if scale > 0 else 1.0
    weight = cvxpy.Variable(quadratic.weight.shape)
    program = cvxpy.Problem(cvxpy.Minimize(program_loss(quadratic, cvxpy.multiply(mask, weight), unit)))
    program.solve(solver=cvxpy.CLARABEL)
    if program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"Clarabel stopped with status {program.status}")
    return float(program.value) * unit**2  # pyright: ignore[reportArgumentType]


def program_loss(quadratic: Quadratic, weight: cvxpy.Expression, unit: float) -> cvxpy.Expression:
    """The loss of a weight [out, in] in units of unit^2, for cvxpy."""
    root = quadratic.root
    error = (quadratic.inputs @ weight.T - quadratic.outputs) @ root.T / unit
    ridge = cvxpy.multiply(np.sqrt(quadratic.damping)[None] / unit, root @ (weight - quadratic.weight))
    return (cvxpy.sum_squares(error) + cvxpy.sum_squares(ridge)) / 2


def penalised(problem: PenalisedLeastSquares) -> Reference:
    """Optimum of a penalised problem by an interior-point method (cvxpy with Clarabel), in units of its own size.

    The returned optimum is the objective of the weight that Clarabel found, measured literally.
    """
    quadratic, penalty = Quadratic.of(problem.loss), problem.penalty
    candidates = [quadratic.weight, np.zeros_like(quadratic.weight)]
    size = min(quadratic.value(weight) + penalty_value(penalty, weight) for weight in candidates)
    if size <= 0:
        return Reference(0.0, max(quadratic.rounding(weight) for weight in candidates))
    # Sizes of weights vary too, and with the units of the inputs: the variable is the change from the original weight
    # in units of what makes up for the largest; for a dead input, of the largest there.
    alive, largest = np.diag(quadratic.gram) > 0, np.abs(quadratic.weight).max(0)
    made_up = float((largest * quadratic.scale)[alive].max(initial=0.0)) / quadratic.scale
    length = np.where(alive & (made_up > 0), made_up, np.where(largest > 0, largest, 1.0))
    change = cvxpy.Variable(quadratic.weight.shape)
    weight = quadratic.weight + cvxpy.multiply(np.broadcast_to(length, change.shape), change)
    objective = program_loss(quadratic, weight, np.sqrt(size)) + penalty_expression(penalty, weight) / size
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
    return Reference(optimum, quadratic.rounding(found) + PENALISED_ACCURACY * optimum, found)


def penalty_value(penalty: Penalty, weight: Array) -> float:
    """P(V), literally."""
    match penalty:
        case L1(strength):
            return float(strength * np.abs(weight).sum())
        case WeightedL1(weights):
            return float((array(weights) * np.abs(weight)).sum())
        case ElasticNet(strength, ridge):
            return float(strength * np.abs(weight).sum() + ridge / 2 * np.square(weight).sum())
        case ColumnGroups(strength):
            return float(strength * np.linalg.norm(weight, axis=0).sum())
    raise TypeError(f"no reference for the penalty {type(penalty).__name__}: add it to {__name__}")


def penalty_expression(penalty: Penalty, weight: cvxpy.Expression) -> Any:
    """P(V), for cvxpy."""
    match penalty:
        case L1(strength):
            return strength * cvxpy.sum(cvxpy.abs(weight))
        case WeightedL1(weights):
            spread = np.broadcast_to(array(weights), weight.shape)
            return cvxpy.sum(cvxpy.multiply(spread, cvxpy.abs(weight)))
        case ElasticNet(strength, ridge):
            return strength * cvxpy.sum(cvxpy.abs(weight)) + ridge / 2 * cvxpy.sum_squares(weight)
        case ColumnGroups(strength):
            return strength * cvxpy.sum(cvxpy.norm(weight, 2, axis=0))
    raise TypeError(f"no reference for the penalty {type(penalty).__name__}: add it to {__name__}")
