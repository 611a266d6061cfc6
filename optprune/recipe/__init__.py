"""Recipes: everything a pruning run decides, as one validated object, by name or from a file."""

from optprune.recipe.files import load_recipe, make_recipe, recipe_names
from optprune.recipe.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "make_recipe", "recipe_names"]
