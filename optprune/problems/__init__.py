"""Pruning problems: one kind a file. A problem measures, prints and hashes; it knows no solver and no model."""

from optprune.problems.base import Problem, SelectionProblem
from optprune.problems.linked import Link, LinkedLeastSquares
from optprune.problems.loss import LayerLoss
from optprune.problems.masked import MaskedLeastSquares

__all__ = ["LayerLoss", "Link", "LinkedLeastSquares", "MaskedLeastSquares", "Problem", "SelectionProblem"]
