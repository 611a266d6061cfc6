"""The shipped recipes by what they need of a model."""

from optprune.recipe import load_recipe, recipe_names

ANY_MODEL = [
    name
    for name in recipe_names()
    if (recipe := load_recipe(name)).units.name != "experts" and recipe.vocabulary is None
]
"""the recipes that prune blocks, for models without a router too"""
