"""Recipes: all settings of a pruning run, as one validated object, by name or from a file."""

from optprune.recipe.recipe import Recipe, allocator_of, load_recipe, recipe_names

__all__ = ["Recipe", "allocator_of", "load_recipe", "recipe_names"]
