"""Comparison of recipes on the same statistics, texts and evaluator, in one table and one picture."""

from optprune.comparison.dense import DensePredictions
from optprune.comparison.frontier import Frontier, FrontierRow, Speed
from optprune.comparison.frontier_run import frontier
from optprune.comparison.grid import Cell
from optprune.comparison.kept_folder import ComparisonFolder
from optprune.comparison.results import CellResult, Comparison, Figures, Row, picture_of
from optprune.comparison.run import compare

__all__ = [
    "Cell",
    "CellResult",
    "Comparison",
    "ComparisonFolder",
    "DensePredictions",
    "Figures",
    "Frontier",
    "FrontierRow",
    "Row",
    "Speed",
    "compare",
    "frontier",
    "picture_of",
]
