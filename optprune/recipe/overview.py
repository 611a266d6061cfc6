"""An overview of the recipes: what they prune, what loads the folder, and what they cost."""

from collections.abc import Callable
from dataclasses import dataclass

from optprune.recipe.files import load_recipe, recipe_names
from optprune.recipe.groups import DepthSearch, UniformShares
from optprune.recipe.recipe import Recipe

FLOORS = {
    "alps": 5.0,
    "alps_plus": 9.1,
    "fasp": 1.3,
    "fistapruner_plus": 18.0,
    "flap": 1.1,
    "magnitude": 1.4,
    "osscar": 1.9,
    "spap": 3.1,
    "sparse_best": 11.0,
    "sparsegpt": 2.1,
    "structured_best": 8.4,
    "structured_uniform_best": 5.8,
    "spap_plus": 3.6,
    "wanda": 1.4,
}
"""how many times as long as the two calibration passes a run takes, the mean of its seeds, where that is measured: on
SmolLM2-135M, with 8192 calibration tokens, by `python -m benchmarks.models`"""


@dataclass(frozen=True)
class Kind:
    """Recipes that prune the same kind of thing."""

    title: str
    holds: Callable[[Recipe], bool]

    def recipes(self) -> list[Recipe]:
        """Its recipes, the cheapest first as far as that is known."""
        found = [recipe for recipe in map(load_recipe, recipe_names()) if self.holds(recipe)]
        return sorted(found, key=lambda recipe: FLOORS.get(recipe.name, float("inf")))


KINDS = (
    Kind("whole units: a smaller model, faster everywhere", lambda recipe: bool(recipe.units.kinds)),
    Kind(
        "single weights: zeros in a folder of the same size, faster where a runtime has a kernel for them",
        lambda recipe: recipe.units.family is not None,
    ),
    Kind("experts: whole ones, with their rows of the router", lambda recipe: recipe.units.name == "experts"),
    Kind("depth: whole attention and MLP sub-blocks", lambda recipe: recipe.units.name == "blocks"),
)
"""every shipped recipe is in one of them"""


def loads_stock(recipe: Recipe) -> bool:
    """Whether stock transformers loads what a recipe makes of any model, without code from the folder."""
    if recipe.units.family is not None:
        return True
    if isinstance(recipe.allocation, DepthSearch):
        return recipe.allocation.parts == "layers"
    return isinstance(recipe.allocation, UniformShares) and recipe.units.name in ("mlp", "experts")
