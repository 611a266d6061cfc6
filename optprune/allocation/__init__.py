"""Allocation: how a budget over the whole model is divided over its blocks."""

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import Allocator, DenseModel, Division, MeasuredBudget
from optprune.allocation.by_cost import ByCost
from optprune.allocation.dense import Dense
from optprune.allocation.depth import Depth
from optprune.allocation.expert_budget import ExpertBudget
from optprune.allocation.given import Given
from optprune.allocation.uniform import Uniform

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
