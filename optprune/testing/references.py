"""References: the optimum of small problems by numpy, scipy and cvxpy, without any solver of optprune.

A reference reads only a problem's data: quadratic.py rebuilds the loss from the moments. It needs scipy and
cvxpy, with SCIP for `mixed_integer` (the extra `testing`); without them the import fails, because a skipped
check proves nothing.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import cvxpy
import numpy as np
import scipy.linalg
import torch

from optprune.errors import InputError
from optprune.grids import Grid
from optprune.patterns import NM, RowWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import (
    GridLeastSquares,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
    to_cvxpy,
)
from optprune.problems.quadratic import Array, Quadratic, array, roots

PENALISED_ACCURACY = 1e-8
"""relative accuracy of the reference for penalised problems; the tolerance of Clarabel is a tenth"""


@dataclass(frozen=True)
class Reference:
    """The optimal objective of a problem, and its rounding error."""

    optimum: float
    rounding: float
    weight: Array | None = None
    """a feasible weight [out, in] that attains it, up to rounding"""


def least_squares(problem: MaskedLeastSquares) -> Reference:
    """Return the optimum of a restoration problem, row by row, by ordinary least squares on synthetic tokens.

    A row v with mask M minimises |X*_M v_M - X w|^2 + |D_M^(1/2) (v_M - w_M)|^2: the ridge is more rows of data.
    The returned optimum is the loss of a feasible weight, so an inaccurate minimiser only makes it larger.
    """
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape)
    return of_weight(quadratic, restored(quadratic, mask))


def restored(quadratic: Quadratic, mask: Array) -> Array:
    """Return the best weight [out, in] on a mask [out, in]."""
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
    """Return the best weight on a mask whose rows S couples, by one least-squares problem with a Kronecker product."""
    answer = np.zeros_like(quadratic.weight)
    if not mask.any():
        return answer
    data, right, sizes, noise = _joint_system(quadratic)
    data, largest = data[:, mask.reshape(-1)], np.linalg.norm(data[:, mask.reshape(-1)], 2)
    if largest > 0:
        found = np.asarray(scipy.linalg.lstsq(data, right, cond=min(noise / largest, 1.0))[0])  # pyright: ignore
        answer[mask] = found / sizes[mask.reshape(-1)]
    return answer


def _joint_system(quadratic: Quadratic) -> tuple[Array, Array, Array, float]:
    """Return K, t, the sizes c and the noise of |R (V X*^T - W X^T)|^2 + |R (V - W) D^(1/2)|^2 = |K (c v) - t|^2.

    R^T R = S, and v has the rows of V one after the other. Singular values of K below the noise are rounding.
    """
    ridge, root, outputs = np.diag(np.sqrt(quadratic.damping)), quadratic.root, roots(np.diag(quadratic.metric))
    wanted = np.vstack([quadratic.outputs, ridge @ quadratic.weight.T])
    right = (root @ wanted.T).reshape(-1)
    root, tokens = root / outputs, np.vstack([quadratic.inputs, ridge]) / quadratic.scale
    # Singular values of a Kronecker product are products: rounding in one factor is multiplied by the other.
    noise = quadratic.negligible * np.linalg.norm(root, 2)
    noise += np.sqrt(len(root) * quadratic.epsilon) * np.linalg.norm(root, 2) * np.linalg.norm(tokens, 2)
    return np.kron(root, tokens), right, np.outer(outputs, quadratic.scale).reshape(-1), float(noise)


def of_weight(quadratic: Quadratic, answer: Array) -> Reference:
    """Return the objective of a weight as a reference."""
    return Reference(quadratic.value(answer), quadratic.rounding(answer), answer)


def convex_optimum(problem: MaskedLeastSquares) -> float:
    """Return the optimum of a restoration problem by an interior-point method (cvxpy with Clarabel)."""
    model = to_cvxpy(problem)
    model.program.solve(solver=cvxpy.CLARABEL)
    if model.program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"Clarabel stopped with status {model.program.status}")
    return float(model.program.value) * model.unit  # pyright: ignore[reportArgumentType]


def penalised(problem: PenalisedLeastSquares) -> Reference:
    """Return the optimum of a penalised problem by an interior-point method (cvxpy with Clarabel).

    The returned optimum is the objective of the weight that Clarabel found, measured by the formula.
    """
    quadratic, penalty = Quadratic.of(problem.loss), problem.penalty
    candidates = [quadratic.weight, np.zeros_like(quadratic.weight)]
    if min(quadratic.value(weight) + penalty_value(penalty, weight) for weight in candidates) <= 0:
        return Reference(0.0, max(quadratic.rounding(weight) for weight in candidates))
    model = to_cvxpy(problem)
    tolerances = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
    tight = dict.fromkeys(tolerances, PENALISED_ACCURACY / 10)
    # With the status "inaccurate" Clarabel falls back to the accuracy stated here.
    tight |= {f"reduced_{name}": PENALISED_ACCURACY for name in tolerances}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
        model.program.solve(solver=cvxpy.CLARABEL, max_iter=500, **tight)
    if model.program.status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
        raise ArithmeticError(f"Clarabel stopped with status {model.program.status}")
    found = np.asarray(model.weight.value)
    optimum = quadratic.value(found) + penalty_value(penalty, found)
    return Reference(optimum, quadratic.rounding(found) + PENALISED_ACCURACY * optimum, found)


def penalty_value(penalty: Penalty, weight: Array) -> float:
    """Return P(V), by the formula."""
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


MOST_CHOICES = 5000
"""the most choices that are enumerated"""
SCIP_ACCURACY = 1e-5
"""relative accuracy of the mixed-integer reference: SCIP holds constraints to 1e-6"""


def exhaustive_entries(problem: SparseLeastSquares) -> Reference:
    """Return the optimum of a sparse problem over every mask of the pattern, each restored by least squares.

    Only the pattern couples the rows of a weight, so every subset of a row is restored once for all rows.
    """
    quadratic, pattern = Quadratic.of(problem.loss), problem.pattern
    rows, width = quadratic.weight.shape
    if 2 ** (rows * width) > MOST_CHOICES:
        raise InputError(f"a [{rows}, {width}] weight has too many masks to list: the reference is for 12 entries")
    if quadratic.coupled:
        bits = (np.array(b, dtype=bool).reshape(rows, width) for b in product((False, True), repeat=rows * width))
        masks = [mask for mask in bits if pattern.admits(torch.tensor(mask))]
        return of_weight(quadratic, min((restored(quadratic, mask) for mask in masks), key=quadratic.value))
    subsets = [np.array(bits, dtype=bool) for bits in product((False, True), repeat=width)]
    answers = [restored(quadratic, np.broadcast_to(subset, (rows, width))) for subset in subsets]
    losses = np.array([quadratic.row_values(answer) for answer in answers])
    counts = np.array([subset.sum() for subset in subsets])
    match pattern:
        case RowWise(keep):
            choice = [np.where(counts == keep, losses[:, row], np.inf).argmin() for row in range(rows)]
        case NM(n, m):
            fits = np.array([(subset.reshape(-1, m).sum(1) == n).all() for subset in subsets])
            choice = [np.where(fits, losses[:, row], np.inf).argmin() for row in range(rows)]
        case Unstructured(keep):
            # The best subset of every count in every row, then every distribution of the count over the rows.
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
    return of_weight(quadratic, np.array([answers[i][row] for row, i in enumerate(choice)]))


def exhaustive(problem: StructuredLeastSquares) -> Reference:
    """Return the optimum of a structured problem over every admissible choice of units, each restored."""
    quadratic = Quadratic.of(problem.loss)
    columns, slots = problem.channels.columns.cpu().numpy(), problem.channels.slots.cpu().numpy()
    names = np.unique(slots)
    each = [list(combinations(np.flatnonzero(slots == slot), problem.keep // len(names))) for slot in names]
    count = int(np.prod([len(choices) for choices in each]))
    if count > MOST_CHOICES:
        raise InputError(f"{count} choices of units are too many to list: the reference is for at most {MOST_CHOICES}")
    answers = []
    for choice in product(*each):
        kept = np.isin(np.arange(len(slots)), [unit for part in choice for unit in part])
        answers.append(restored(quadratic, _mask_of(quadratic, columns, kept)))
    return of_weight(quadratic, min(answers, key=quadratic.value))


def exhaustive_grid(problem: GridLeastSquares) -> Reference:
    """Return the optimum of a problem on a grid over all integers of a row, with scales that are any real numbers.

    It is below the optimum with stored scales, of which the returned weight is one: that with each scale rounded.
    For at most two blocks in a row and 12 bits, or 4 weights of 2 bits if a metric couples the rows.
    """
    quadratic, grid = Quadratic.of(problem.loss), problem.grid
    rows, width = quadratic.weight.shape
    bits = rows * width * (grid.bits + 1) if quadratic.coupled else width * grid.bits
    if width > 2 * grid.block or bits > 12:
        raise InputError(
            "the reference is for rows of at most two blocks and 12 bits, or 4 weights of 2 bits with a full metric"
        )
    every = _integers(grid, width)
    mask = np.ones((1, width), dtype=bool) if problem.mask is None else problem.mask.cpu().numpy()
    if quadratic.coupled:
        return _coupled_grid(quadratic, grid, [every[(every[:, ~kept] == 0).all(1)] for kept in mask])
    data = np.vstack([quadratic.inputs, np.diag(np.sqrt(quadratic.damping))])
    wanted = np.vstack([quadratic.outputs, np.sqrt(quadratic.damping)[:, None] * quadratic.weight.T])
    best, rounded = np.zeros_like(quadratic.weight), np.zeros_like(quadratic.weight)
    for row, kept in enumerate(np.broadcast_to(mask, (rows, width))):
        integers = every[(every[:, ~kept] == 0).all(1)]
        # [choices, blocks, samples]: the output of each block for a scale of one.
        by_block = (each.reshape(len(each), -1, grid.block) for each in (integers, data))
        outputs = np.einsum("cbj,tbj->cbt", *by_block)
        scales = _least_squares(outputs, wanted[:, row], quadratic.negligible)
        found = np.repeat(scales, grid.block, axis=1) * integers
        stored = torch.from_numpy(scales).to(grid.scale_dtype).double().numpy()
        other = np.repeat(stored, grid.block, axis=1) * integers
        best[row] = found[_row_losses(quadratic, found, row).argmin()]
        rounded[row] = other[_row_losses(quadratic, other, row).argmin()]
    return Reference(quadratic.value(best), quadratic.rounding(best), rounded)


def _integers(grid: Grid, width: int) -> Array:
    """Return all integers [choices, width] that a row can have."""
    lowest = 1 - 2**grid.bits if grid.shifted else -(2 ** (grid.bits - 1))
    highest = 2**grid.bits - 1 if grid.shifted else 2 ** (grid.bits - 1) - 1
    every = np.array(list(product(range(lowest, highest + 1), repeat=width)), dtype=float)
    blocks = every.reshape(len(every), -1, grid.block)
    spans = np.maximum(blocks.max(2), 0) - np.minimum(blocks.min(2), 0)
    return every[(spans <= 2**grid.bits - 1).all(1)]


def _coupled_grid(quadratic: Quadratic, grid: Grid, integers: list[Array]) -> Reference:
    """Return the optimum over the integers of all rows together, given as one list for each row or one for all."""
    rows, width = quadratic.weight.shape
    lists = integers * rows if len(integers) == 1 else integers
    joint = np.array([np.concatenate(each) for each in product(*lists)])
    # [choices, blocks, rows x in]: the weight of each block with a scale of one.
    places = np.arange(rows * width) // grid.block
    each = joint[:, None, :] * (places == np.arange(places[-1] + 1)[:, None])
    data, right, sizes, noise = _joint_system(quadratic)
    directions = (each * sizes) @ data.T
    largest = np.linalg.norm(directions, 2, axis=(1, 2))
    cut = np.minimum(noise / np.where(largest > 0, largest, np.inf), 1.0)
    scales = (np.linalg.pinv(directions.mT, rcond=cut) @ right[:, None])[..., 0]
    stored = torch.from_numpy(scales).to(grid.scale_dtype).double().numpy()
    found = []
    for one in (scales, stored):
        weights = np.einsum("cb,cbw->cw", one, each)
        losses = np.sum(((weights * sizes) @ data.T - right) ** 2, 1)
        found.append(weights[losses.argmin()].reshape(rows, width))
    return Reference(quadratic.value(found[0]), quadratic.rounding(found[0]), found[1])


def _row_losses(quadratic: Quadratic, weights: Array, row: int) -> Array:
    """Return the loss of each of the weights [choices, in] in a row, up to a constant."""
    return np.sum((weights @ quadratic.gram) * weights, 1) / 2 - weights @ quadratic.target[row]


def _least_squares(directions: Array, wanted: Array, negligible: float) -> Array:
    """Return the factors [choices, 1 or 2] of directions [choices, 1 or 2, samples] nearest to `wanted` [samples]."""
    first = directions[:, 0]
    if directions.shape[1] == 1:
        return _factor(first, wanted, negligible)[:, None]
    # The second direction without its part along the first one.
    share = _factor(first, directions[:, 1], negligible)
    second = directions[:, 1] - share[:, None] * first
    factor = _factor(second, wanted, negligible)
    return np.stack([_factor(first, wanted - factor[:, None] * second, negligible) - share * factor, factor], 1)


def _factor(direction: Array, wanted: Array, negligible: float) -> Array:
    """Return the factor of each direction [choices, samples] nearest to `wanted`; 0 for one that is rounding."""
    size = np.sum(direction * direction, 1)
    return np.where(size > negligible**2, np.sum(direction * wanted, 1) / np.where(size > 0, size, 1.0), 0.0)


def mixed_integer(problem: SparseLeastSquares | StructuredLeastSquares) -> Reference:
    """Return the optimum of a small problem that chooses weights or units, by SCIP through cvxpy.

    A must be positive definite. About ten units take a second. The returned optimum is the loss of the choice restored
    by least squares, so it is never too low.
    """
    quadratic, model = Quadratic.of(problem.loss), to_cvxpy(problem)
    assert model.choice is not None
    model.program.solve(solver=cvxpy.SCIP)
    if model.program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"SCIP stopped with status {model.program.status}")
    kept = np.asarray(model.choice.value) > 0.5
    structured = isinstance(problem, StructuredLeastSquares)
    mask = _mask_of(quadratic, problem.channels.columns.cpu().numpy(), kept) if structured else kept
    found = of_weight(quadratic, restored(quadratic, mask))
    return Reference(found.optimum, found.rounding + SCIP_ACCURACY * model.unit, found.weight)


def _mask_of(quadratic: Quadratic, columns: Array, kept: Array) -> Array:
    """Return the mask [out, in] of the kept units; columns of no unit stay."""
    mask = np.ones(quadratic.weight.shape, dtype=bool)
    mask[:, columns[~kept].reshape(-1)] = False
    return mask


REFERENCES: dict[type[Problem], Callable[..., Reference]] = {
    GridLeastSquares: exhaustive_grid,
    MaskedLeastSquares: least_squares,
    PenalisedLeastSquares: penalised,
    SparseLeastSquares: exhaustive_entries,
    StructuredLeastSquares: exhaustive,
}
"""for each concrete kind of problem a function that finds its optimum"""


@lru_cache(maxsize=64)
def reference(problem: Problem) -> Reference:
    """Return the optimum of a small problem, found without any solver of optprune, and its rounding error.

    It is cached for the problem object, because every law asks for it again.
    """
    if type(problem) not in REFERENCES:
        raise TypeError(f"no reference for {type(problem).__name__}: add one to optprune.testing.references.REFERENCES")
    return REFERENCES[type(problem)](problem)


def reference_optimum(problem: Problem) -> float:
    """Return the optimal objective of a small problem, found without any solver of optprune."""
    return reference(problem).optimum
