"""Grid of a comparison: recipes, sparsities and seeds, checked before anything is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optprune.errors import InputError
from optprune.recipe import Recipe
from optprune.recipe.recipe import recipe_with
from optprune.system.wording import shown

RECIPES = "the recipes"
"""the fact that holds the recipes by name"""
OF_A_CELL = ("sparsity", "seed")
"""recipe fields that a cell sets"""
MOST_DRAWS = 1000
"""maximum number of seeds: more is taken for a mistake"""


@dataclass(frozen=True, order=True)
class Cell:
    """One model of a comparison: a recipe at a sparsity, calibrated on the windows that a seed draws."""

    recipe: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.recipe}-{self.sparsity:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.recipe} at {self.sparsity:g}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of a comparison, with the recipe of each."""

    recipes: Mapping[str, str | Recipe]
    """names or recipes, by their names in the table"""
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """recipe fields that are set in all recipes"""

    @classmethod
    def of(
        cls,
        recipes: Sequence[str | Recipe],
        sparsities: Sequence[float],
        seeds: int | Sequence[int],
        settings: Mapping[str, Any] | None,
    ) -> "Grid":
        """Return the grid. Raises InputError where a value is invalid or given twice."""
        named = {_label(recipe): recipe for recipe in recipes}
        if len(named) < len(recipes) or not recipes:
            raise InputError(
                f"the recipes are {', '.join(map(_label, recipes)) or 'empty'}: give at least one, and each once"
            )
        for label in named:
            if Path(label).name != label or "\\" in label:
                raise InputError(f"the recipe's name {shown(label)} cannot be that of a file: name it otherwise")
        for what, values in (("sparsities", sparsities), ("seeds", () if isinstance(seeds, int) else seeds)):
            # Files of cells have names with six digits.
            if len({f"{value:g}" for value in values} if what == "sparsities" else set(values)) < len(values):
                raise InputError(f"the {what} {', '.join(map(str, values))} repeat a value: give each once")
        if isinstance(seeds, int) and seeds > MOST_DRAWS:
            raise InputError(f"the number of seeds cannot be {seeds}: give at most {MOST_DRAWS}")
        drawn = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
        if not sparsities or not drawn:
            raise InputError("a comparison needs at least one sparsity and one seed: give both")
        for key in settings or {}:
            if key in OF_A_CELL:
                raise InputError(f"the recipe field {key!r} differs between cells: give it as sparsities or seeds")
        grid = cls(named, tuple(sparsities), drawn, dict(settings or {}))
        for cell in grid.cells():
            grid.recipe(cell)
        return grid

    def cells(self) -> Iterator[Cell]:
        """Yield the cells by seed, then by recipe: cells of a seed share the statistics of the dense model."""
        for seed in self.seeds:
            for recipe in self.recipes:
                for sparsity in self.sparsities:
                    yield Cell(recipe, sparsity, seed)

    @property
    def held_out(self) -> float:
        """The largest share of the windows that a recipe holds out."""
        refits = [self.recipe(Cell(name, self.sparsities[0], self.seeds[0])).refit for name in self.recipes]
        return max(0.0 if refit is None else refit.held_out for refit in refits)

    def recipe(self, cell: Cell) -> Recipe:
        """Return the recipe of a cell. Raises InputError where it is invalid."""
        base, own = self.recipes[cell.recipe], {"sparsity": cell.sparsity, "seed": cell.seed}
        return recipe_with(base, {**self.settings, **own})

    def facts(self) -> dict[str, Any]:
        """Return the grid as plain data."""
        first = {name: self.recipe(Cell(name, self.sparsities[0], self.seeds[0])) for name in self.recipes}
        fields = {name: recipe.to_dict() for name, recipe in first.items()}
        plain = {name: {key: own[key] for key in own if key not in OF_A_CELL} for name, own in fields.items()}
        code = {name: found for name, recipe in first.items() if (found := recipe.own_code())}
        return {
            RECIPES: plain,
            **({"the user's own code": code} if code else {}),
            "the sparsities": list(self.sparsities),
            "the seeds": list(self.seeds),
        }


def _label(recipe: str | Recipe) -> str:
    if isinstance(recipe, Recipe):
        return recipe.name
    return Path(recipe).stem if Path(recipe).suffix.lower() in (".yaml", ".yml") else recipe
