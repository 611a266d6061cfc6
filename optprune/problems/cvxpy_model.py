"""Problems as cvxpy programs, for the solvers of others: Clarabel, SCIP, HiGHS, Gurobi and what else cvxpy reaches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics import linalg
from optprune.patterns import NM, PartlyFixed, Pattern, RowLimits, RowWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems.base import Problem
from optprune.problems.masked import MaskedLeastSquares, SelectionProblem
from optprune.problems.penalised import PenalisedLeastSquares
from optprune.problems.program_file import set_variables, write_program
from optprune.problems.quadratic import Array, Quadratic, array, roots
from optprune.problems.sparse import SparseLeastSquares
from optprune.problems.structured import StructuredLeastSquares
from optprune.system.wording import install

if TYPE_CHECKING:
    import cvxpy

LARGEST = 2 * 10**7
"""the most coefficients of a program: a layer's are the product of its outputs, its inputs and the inputs again"""
NONE = "a {} problem has no convex or mixed-integer program that cvxpy takes"
MISSING = f"a cvxpy program needs cvxpy: {install('testing')}"


@dataclass(frozen=True, eq=False)
class CvxpyModel:
    """A problem as a cvxpy program, which any solver of cvxpy takes, and what its variables stand for.

    The least value of `program`, times `unit`, is that of the problem up to the accuracy of the solver. Where the
    problem chooses weights, `choice` is the boolean variable of the choice, and |V_ij| <= M_ij z_ij for bounds M_ij
    that every weight as good as a known one keeps.
    """

    problem: Problem
    program: "cvxpy.Problem"
    weight: "cvxpy.Expression"
    """V [out, in]"""
    unit: float
    """the value of the problem's objective that is 1 in the program"""
    choice: "cvxpy.Variable | None" = None
    """the kept weights [out, in], or the kept units, of a problem that chooses them"""

    def value(self) -> Tensor:
        """Return the weight [out, in] that the solver found, with exact zeros, for `problem.measure`.

        InputError where the program has not been solved.
        """
        loss, problem = self.problem.loss, self.problem
        if self.weight.value is None:
            raise InputError(f"the program has no answer ({self.program.status}): solve it first")
        weight = linalg.from_numpy(np.array(self.weight.value)).to(loss.weight)
        if isinstance(problem, MaskedLeastSquares):
            return torch.where(problem.mask, weight, 0.0)
        if self.choice is None:
            return weight
        assert isinstance(problem, SelectionProblem)
        kept = linalg.from_numpy(np.array(self.choice.value) > 0.5).to(loss.weight.device)
        return torch.where(problem.mask(kept), weight, 0.0)

    def write(self, path: str | Path) -> None:
        """Write the program to a file that ends in .mps, .lp or .cip, as a whole or not at all, by the writer of SCIP.

        Its variables are x_0, x_1, ... InputError for another ending, or where pyscipopt is not installed.
        """
        write_program(self.program, path)

    def value_of(self, variables: Sequence[float] | Array) -> Tensor:
        """Return the weight [out, in] for the values of x_0, x_1, ... that a solver found for the file."""
        set_variables(self.program, np.asarray(variables))
        return self.value()


def to_cvxpy(problem: Problem) -> CvxpyModel:
    """Return a problem as a cvxpy program; InputError for a kind without one, or for a layer that is too large."""
    _cvxpy()
    outputs, inputs = problem.loss.weight.shape
    if outputs * inputs * inputs > LARGEST:
        raise InputError(
            f"a layer [{outputs}, {inputs}] is too large for cvxpy: a program of it has {outputs * inputs * inputs:,} "
            f"coefficients, and at most {LARGEST:,} are made"
        )
    return _model(problem)


def _cvxpy() -> Any:
    """Return the module cvxpy, whose own types are partly unknown. InputError where it is not installed."""
    try:
        return import_module("cvxpy")
    except ImportError as error:
        raise InputError(MISSING) from error


@singledispatch
def _model(problem: Problem) -> CvxpyModel:
    raise InputError(NONE.format(problem.kind))


@_model.register
def _(problem: MaskedLeastSquares) -> CvxpyModel:
    cvxpy = _cvxpy()
    quadratic = Quadratic.of(problem.loss)
    mask = np.broadcast_to(problem.mask.cpu().numpy(), quadratic.weight.shape)
    start = np.where(mask, quadratic.weight, 0.0)
    change = cvxpy.Variable(quadratic.weight.shape)
    weight = start + cvxpy.multiply(mask * _length(quadratic), change)
    unit = _positive(quadratic.value(start), quadratic.rounding(start))
    return CvxpyModel(problem, cvxpy.Problem(cvxpy.Minimize(_loss(quadratic, weight, unit))), weight, unit)


@_model.register
def _(problem: PenalisedLeastSquares) -> CvxpyModel:
    cvxpy = _cvxpy()
    quadratic, old = Quadratic.of(problem.loss), problem.loss.weight
    starts = (old, torch.zeros_like(old))
    unit = _positive(min(problem.objective(start) for start in starts), quadratic.rounding(quadratic.weight))
    change = cvxpy.Variable(quadratic.weight.shape)
    weight = quadratic.weight + cvxpy.multiply(np.broadcast_to(_length(quadratic), change.shape), change)
    objective = _loss(quadratic, weight, unit) + _penalty(problem.penalty, weight) / unit
    return CvxpyModel(problem, cvxpy.Problem(cvxpy.Minimize(objective)), weight, unit)


@_model.register
def _(problem: SelectionProblem) -> CvxpyModel:
    cvxpy = _cvxpy()
    choice, kept, limits = _choice(problem)
    quadratic = Quadratic.of(problem.loss)
    most, unit = _bounds(problem, quadratic)
    share = cvxpy.Variable(most.shape)
    weight = cvxpy.multiply(most, share)
    limits = [*limits, share <= kept, -share <= kept]
    program = cvxpy.Problem(cvxpy.Minimize(_loss(quadratic, weight, unit)), limits)
    return CvxpyModel(problem, program, weight, unit, choice)


# -- parts of programs


def _choice(problem: SelectionProblem) -> "tuple[cvxpy.Variable, cvxpy.Expression, list[Any]]":
    """Return the boolean variable of a choice, the mask [out, in] that follows from it, and the constraints on it.

    InputError for a kind of choice of one's own.
    """
    cvxpy = _cvxpy()
    shape = problem.loss.weight.shape
    if isinstance(problem, SparseLeastSquares):
        choice = cvxpy.Variable(tuple(shape), boolean=True)
        return choice, choice, _limits(problem.pattern, choice)
    if not isinstance(problem, StructuredLeastSquares):
        raise InputError(NONE.format(problem.kind))
    channels = problem.channels
    choice = cvxpy.Variable(channels.units, boolean=True)
    # Row j has a one at the unit of column j; a column of no unit always stays.
    units, free = np.zeros((shape[1], channels.units)), np.ones(shape[1])
    for number, columns in enumerate(channels.columns.cpu().numpy()):
        units[columns, number], free[columns] = 1.0, 0.0
    kept = np.ones((shape[0], 1)) @ cvxpy.reshape(units @ choice + free, (1, len(free)), order="C")
    slots = channels.by_slot.cpu().numpy()
    return choice, kept, [cvxpy.sum(choice[slot]) == problem.pattern.keep for slot in slots]


def _positive(value: float, least: float) -> float:
    """Return a value where it is above a least one, else that; 1 where both are zero."""
    largest = max(value, least)
    return largest if largest > 0 else 1.0


def _length(quadratic: Quadratic) -> Array:
    """Return a length [in] in which the changes of weights are of a like size.

    Sizes of weights vary with the units of the inputs: it is the largest contribution to an output over the size of the
    input, and for a dead input the largest weight.
    """
    alive, largest = np.diag(quadratic.gram) > 0, np.abs(quadratic.weight).max(0)
    length = float((largest * quadratic.scale)[alive].max(initial=0.0)) / quadratic.scale
    return np.where(alive & (length > 0), length, np.where(largest > 0, largest, 1.0))


def _loss(quadratic: Quadratic, weight: "cvxpy.Expression", unit: float) -> "cvxpy.Expression":
    """Return the loss of a weight [out, in] over a unit."""
    cvxpy = _cvxpy()
    root, size = quadratic.root, np.sqrt(unit)
    error = (quadratic.inputs @ weight.T - quadratic.outputs) @ root.T / size
    ridge = cvxpy.multiply(np.sqrt(quadratic.damping)[None] / size, root @ (weight - quadratic.weight))
    return (cvxpy.sum_squares(error) + cvxpy.sum_squares(ridge)) / 2


def _penalty(penalty: Penalty, weight: "cvxpy.Expression") -> Any:
    """Return P(V). InputError for a penalty of one's own."""
    cvxpy = _cvxpy()
    match penalty:
        case L1(strength):
            return strength * cvxpy.sum(cvxpy.abs(weight))
        case WeightedL1(weights):
            return cvxpy.sum(cvxpy.multiply(np.broadcast_to(array(weights), weight.shape), cvxpy.abs(weight)))
        case ElasticNet(strength, ridge):
            return strength * cvxpy.sum(cvxpy.abs(weight)) + ridge / 2 * cvxpy.sum_squares(weight)
        case ColumnGroups(strength):
            return strength * cvxpy.sum(cvxpy.norm(weight, 2, axis=0))
        case _:
            raise InputError(
                f"the penalty {type(penalty).__name__} has no expression of cvxpy: add it to the objective"
            )


def _limits(pattern: Pattern, choice: "cvxpy.Variable") -> list[Any]:
    """Return the constraints of a pattern on a choice [out, in]. InputError for a pattern of one's own."""
    cvxpy = _cvxpy()
    match pattern:
        case Unstructured(keep):
            return [cvxpy.sum(choice) == keep]
        case RowWise(keep):
            return [cvxpy.sum(choice, axis=1) == keep]
        case NM(n, m):
            groups = cvxpy.reshape(choice, (choice.size // m, m), order="C")
            return [cvxpy.sum(groups, axis=1) == n]
        case RowLimits(keep, least, most):
            counts = cvxpy.sum(choice, axis=1)
            return [cvxpy.sum(choice) == keep, counts >= least, counts <= most]
        case PartlyFixed(inner, stays, goes):
            fixed = [array(part) for part in (stays, goes)]
            return [*_limits(inner, choice), choice >= fixed[0], choice <= 1 - fixed[1]]
        case _:
            raise InputError(f"the pattern {type(pattern).__name__} has no linear constraints that are known")


def _bounds(problem: SelectionProblem, quadratic: Quadratic) -> tuple[Array, float]:
    """Return M [out, in] with |V_ij| <= M_ij for every V that is at least as good as a known one, and a unit of f.

    By f(V) = f(V0) + 1/2 tr(S (V - V0) A (V - V0)^T), |V_ij - (V0)_ij|^2 <= 2 (f(known) - f(V0)) (S^-1)_ii (A^-1)_jj.
    The known one is the start with the kept weights of each row refitted. InputError where A or S is singular.
    """
    start = problem.start()
    kept = np.broadcast_to(problem.mask(problem.support(start)).cpu().numpy(), quadratic.weight.shape)
    smallest = min(np.linalg.eigvalsh(matrix)[0] for matrix in map(_unit_diagonal, (quadratic.gram, quadratic.metric)))
    if smallest <= 4 * len(quadratic.gram) * np.finfo(float).eps:
        raise InputError(
            "no bound of the weights is known where the Gram matrix is singular: damp the loss, e.g. by 0.01"
        )
    inverse = np.linalg.inv(quadratic.gram)
    minimiser = quadratic.target @ inverse
    known = np.where(kept, quadratic.weight, 0.0)
    refitted = np.zeros_like(known)
    for row, mask in enumerate(kept):
        refitted[row, mask] = np.linalg.solve(quadratic.gram[np.ix_(mask, mask)], quadratic.target[row, mask])
    least = min(quadratic.value(known), quadratic.value(refitted))
    spread = max(least - quadratic.value(minimiser), 0.0) + quadratic.rounding(minimiser)
    reach = np.outer(np.diag(np.linalg.inv(quadratic.metric)), np.diag(inverse))
    most = np.abs(minimiser) + np.sqrt(2 * spread * reach) * (1 + 1e-9)
    return most, _positive(spread, quadratic.rounding(known))


def _unit_diagonal(matrix: Array) -> Array:
    """Return a positive semidefinite matrix scaled to a diagonal of ones, and of zeros where it has them."""
    size = roots(np.diag(matrix))
    return matrix / np.outer(size, size)
