"""Allocation: division of a budget over the whole model between its blocks."""

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import Allocator, DenseModel, Division, MeasuredBudget
from optprune.allocation.by_cost import ByCost
from optprune.allocation.depth import Depth
from optprune.allocation.expert_budget import ExpertBudget
from optprune.allocation.uniform import Dense, Given, Uniform

__all__ = [
    "Allocation",
    "Allocator",
    "ByCost",
    "Dense",
    "DenseModel",
    "Depth",
    "Division",
    "ExpertBudget",
    "Given",
    "MeasuredBudget",
    "Uniform",
]
