"""Pruning problems, one kind per file. A problem measures candidates and knows neither solvers nor models."""

from optprune.problems.base import Measurement, Problem
from optprune.problems.cvxpy_model import CvxpyModel, to_cvxpy
from optprune.problems.experts import ExpertChoice
from optprune.problems.files import load_problem, origin_of, save_problem
from optprune.problems.gridded import GridLeastSquares
from optprune.problems.loss import LayerLoss, loss_of_rows
from optprune.problems.masked import MaskedLeastSquares, SelectionProblem
from optprune.problems.penalised import PenalisedLeastSquares
from optprune.problems.rotation import Permutation, Rotation
from optprune.problems.sparse import SparseLeastSquares
from optprune.problems.structured import Channels, StructuredLeastSquares

__all__ = [
    "Channels",
    "CvxpyModel",
    "ExpertChoice",
    "GridLeastSquares",
    "LayerLoss",
    "MaskedLeastSquares",
    "Measurement",
    "PenalisedLeastSquares",
    "Permutation",
    "Problem",
    "Rotation",
    "SelectionProblem",
    "SparseLeastSquares",
    "StructuredLeastSquares",
    "load_problem",
    "loss_of_rows",
    "origin_of",
    "save_problem",
    "to_cvxpy",
]
