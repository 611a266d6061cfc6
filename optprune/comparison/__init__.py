"""Comparison: recipes beside each other on the same statistics, text and evaluator, in one table and picture."""

from optprune.comparison.asked import Cell
from optprune.comparison.dense import DensePredictions
from optprune.comparison.folder import ComparisonFolder
from optprune.comparison.picture import picture_of
from optprune.comparison.results import CellResult, Comparison, Figures, Row
from optprune.comparison.run import compare

__all__ = [
    "Cell",
    "CellResult",
    "Comparison",
    "ComparisonFolder",
    "DensePredictions",
    "Figures",
    "Row",
    "compare",
    "picture_of",
]
