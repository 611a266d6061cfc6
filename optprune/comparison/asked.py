"""What a comparison is asked for: recipes, sparsities and seeds, and the texts, checked before anything costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optprune.errors import InputError
from optprune.recipe import Recipe, load_recipe
from optprune.system.wording import shown
from optprune.texts import Document, Text, normalised_text, read_documents, read_texts

OF_A_CELL = ("sparsity", "seed")
"""the recipe fields that are of a cell"""
MOST_DRAWS = 1000
"""how many draws of the calibration text there are at most: more is taken for a mistake"""


@dataclass(frozen=True, order=True)
class Cell:
    """One model of a comparison: a recipe at a sparsity, calibrated on what a seed draws."""

    recipe: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """A name that a file can have."""
        return f"{self.recipe}-{self.sparsity:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.recipe} at {self.sparsity:g}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Asked:
    """The cells of a comparison, with the recipe of each."""

    recipes: Mapping[str, str | Recipe]
    """the names or the recipes, by what the table calls them"""
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """the recipe fields that are set in all recipes"""

    @classmethod
    def of(
        cls,
        recipes: Sequence[str | Recipe],
        sparsities: Sequence[float],
        seeds: int | Sequence[int],
        settings: Mapping[str, Any] | None,
    ) -> "Asked":
        """What is asked for; InputError where a recipe is named twice, or anything cannot be."""
        named = {_label(recipe): recipe for recipe in recipes}
        if len(named) < len(recipes) or not recipes:
            raise InputError(
                f"the recipes {', '.join(map(_label, recipes)) or 'of a comparison are none'}: give at least one, and "
                "each by a name of its own"
            )
        for what, values in (("sparsities", sparsities), ("seeds", () if isinstance(seeds, int) else seeds)):
            if len(set(values)) < len(values):
                raise InputError(f"the {what} {', '.join(map(str, values))} hold one twice: give each once")
        if isinstance(seeds, int) and seeds > MOST_DRAWS:
            raise InputError(f"{seeds} draws are more than a comparison has: give {MOST_DRAWS} at most")
        drawn = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
        if not sparsities or not drawn:
            raise InputError("a comparison needs one sparsity and one seed at least")
        for key in settings or {}:
            if key in OF_A_CELL:
                raise InputError(f"the recipe field {key!r} is what the cells differ in: give it as such")
        asked = cls(named, tuple(sparsities), drawn, dict(settings or {}))
        for cell in asked.cells():
            asked.recipe(cell)
        return asked

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, recipe by recipe: what is measured of the dense model goes by the seed."""
        for seed in self.seeds:
            for recipe in self.recipes:
                for sparsity in self.sparsities:
                    yield Cell(recipe, sparsity, seed)

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of a cell; InputError where it cannot be."""
        base, own = self.recipes[cell.recipe], {"sparsity": cell.sparsity, "seed": cell.seed}
        if isinstance(base, Recipe):
            return Recipe(dict(base), {**self.settings, **own})
        return load_recipe(base, {**self.settings, **own})

    def facts(self) -> dict[str, Any]:
        """What was asked for, as plain data."""
        first = {name: self.recipe(Cell(name, self.sparsities[0], self.seeds[0])).to_dict() for name in self.recipes}
        plain = {name: {key: value for key, value in of.items() if key not in OF_A_CELL} for name, of in first.items()}
        return {"the recipes": plain, "the sparsities": list(self.sparsities), "the seeds": list(self.seeds)}


def _label(recipe: str | Recipe) -> str:
    if isinstance(recipe, Recipe):
        return recipe.name
    return Path(recipe).stem if Path(recipe).suffix in (".yaml", ".yml") else recipe


def texts_apart(calibration: str, text: str) -> tuple[list[Text], list[Document]]:
    """The texts to calibrate on and the documents to evaluate on; InputError where they have one in common."""
    fitted, told = read_texts(calibration), read_documents(text)
    common = {normalised_text(document) for one in fitted for document in one.documents} & set(
        map(normalised_text, told)
    )
    if common:
        first = shown(min(common)[:60])
        raise InputError(
            f"the evaluation text {text} shares {len(common)} of its {len(told)} documents with the calibration text "
            f"{calibration}, such as {first}: evaluate on a text that no model was fitted to"
        )
    return fitted, told
