"""Which allocator a recipe asks for."""

from optprune.allocation import Allocation, Allocator, ByCost, Depth, Given, Uniform
from optprune.allocation.weight_costs import WeightBudget
from optprune.allocation.width_costs import WidthBudget
from optprune.models import Blocks
from optprune.recipe.recipe import Recipe


def allocator_of(recipe: Recipe, allocation: Allocation | None = None) -> Allocator:
    """The allocator of a run; an allocation that is given comes before what the recipe says."""
    if allocation is not None:
        return Given(recipe.units, allocation)
    if isinstance(recipe.units, Blocks):
        return Depth(recipe.sparsity, recipe.depth_parts, recipe.depth_score, recipe.depth_tokens)
    return by_cost(recipe) if recipe.divides else Uniform(recipe.units, recipe.sparsity, recipe.width_multiple)


def by_cost(recipe: Recipe) -> ByCost:
    """The division of one budget over the whole model, with a recipe's numbers."""
    if recipe.units.family is not None:
        budget = WeightBudget(recipe.units.family, recipe.sparsity, recipe.least_kept, recipe.most_kept)
    else:
        budget = WidthBudget(
            recipe.units,
            recipe.sparsity,
            recipe.least_kept,
            recipe.width_multiple,
            recipe.budget,
            recipe.budget_tokens,
        )
    weighed = recipe.output_metric != "none"
    return ByCost(recipe.units, budget, recipe.damping, recipe.fit_bias, weighed, recipe.probe_tokens)
