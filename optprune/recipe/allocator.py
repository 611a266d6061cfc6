"""The allocator that a recipe asks for."""

from optprune.allocation import Allocation, Allocator, ByCost, Dense, Depth, ExpertBudget, Given, Uniform
from optprune.allocation.weight_costs import WeightBudget
from optprune.allocation.width_costs import WidthBudget
from optprune.errors import InputError
from optprune.models import Experts
from optprune.recipe.groups import DepthSearch, GlobalBudget, UniformShares
from optprune.recipe.recipe import Recipe


def allocator_of(recipe: Recipe, allocation: Allocation | None = None) -> Allocator:
    """The allocator of a run; an allocation that is given comes before what the recipe says."""
    allocation = allocation or recipe.given
    if allocation is not None:
        return Given(recipe.units, allocation)
    if not recipe.sparsity:
        return Dense()
    match recipe.allocation:
        case DepthSearch() as depth:
            return Depth(recipe.sparsity, depth.parts, depth.score, depth.score_tokens)
        case GlobalBudget() as asked if isinstance(recipe.units, Experts):
            return ExpertBudget(recipe.units, recipe.sparsity, asked.least, asked.probe_tokens)
        case GlobalBudget() if recipe.divides:
            return by_cost(recipe)
        case UniformShares() | GlobalBudget() as shares:
            return Uniform(recipe.units, recipe.sparsity, shares.multiple)
    raise AssertionError("an allocation that is given was met above")


def by_cost(recipe: Recipe) -> ByCost:
    """The division of one budget over the whole model, with a recipe's numbers."""
    asked = recipe.allocation
    if not isinstance(asked, GlobalBudget):
        raise InputError(f"the recipe divides no budget: its allocation is {asked.kind}, not global")
    if recipe.units.family is not None:
        budget = WeightBudget(recipe.units.family, recipe.sparsity, asked.least, asked.most)
    else:
        budget = WidthBudget(recipe.units, recipe.sparsity, asked.least, asked.multiple, asked.currency, asked.tokens)
    weighed = recipe.metric is not None
    return ByCost(recipe.units, budget, recipe.damping, recipe.fit_bias, weighed, asked.probe_tokens)
