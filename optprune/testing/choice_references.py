"""References for choices of what to keep: every choice enumerated, or a mixed-integer program by cvxpy with SCIP."""

from itertools import combinations, product
from typing import Any

import cvxpy
import numpy as np
import torch

from optprune.errors import InputError
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import SparseLeastSquares, StructuredProblem
from optprune.testing.convex_references import Reference, of_weight, program_loss, restored
from optprune.testing.quadratic import Array, Quadratic

MOST_CHOICES = 5000
"""enumerating more than this is no longer tiny"""
SCIP_ACCURACY = 1e-5
"""relative accuracy of the mixed-integer reference: SCIP holds constraints to 1e-6"""


def exhaustive_entries(problem: SparseLeastSquares) -> Reference:
    """Optimum of a sparse problem: every mask of the pattern, each restored by least squares.

    The rows of a weight only meet in the pattern, so every subset of a row is restored once for all rows.
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
    return of_weight(quadratic, np.array([answers[i][row] for row, i in enumerate(choice)]))


def exhaustive(problem: StructuredProblem) -> Reference:
    """Optimum of a structured or linked problem: every admissible choice of units, each restored by least squares."""
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
    spread = max(quadratic.value(restored(quadratic, first)) - quadratic.value(minimiser), 0.0)
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
    program = cvxpy.Problem(cvxpy.Minimize(program_loss(quadratic, weight, unit)), [*bounds, *counts])
    program.solve(solver=cvxpy.SCIP)
    if program.status != cvxpy.OPTIMAL:
        raise ArithmeticError(f"SCIP stopped with status {program.status}")
    answer = restored(quadratic, _mask_of(quadratic, columns, np.asarray(keep.value) > 0.5))
    found = of_weight(quadratic, answer)
    return Reference(found.optimum, found.rounding + SCIP_ACCURACY * spread, answer)


def _first_of_every_slot(problem: StructuredProblem, slots: Array) -> Array:
    each = problem.keep // len(np.unique(slots))
    return np.concatenate([np.flatnonzero(slots == slot)[:each] for slot in np.unique(slots)])


def _mask_of(quadratic: Quadratic, columns: Array, kept: Array) -> Array:
    """The mask [out, in] of the kept units; columns of no unit stay."""
    mask = np.ones(quadratic.weight.shape, dtype=bool)
    mask[:, columns[~kept].reshape(-1)] = False
    return mask
