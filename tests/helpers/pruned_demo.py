"""The demo's model, pruned by a recipe into a folder, as the command line does it."""

from dataclasses import dataclass, field
from pathlib import Path

from optprune.cli import main

OPTIONS = ["--calibration", "demo:calibration", "--samples", "16", "--seq-length", "128", "--sparsity", "0.2"]


@dataclass(frozen=True)
class PrunedDemo:
    """Folders of the demo's model, each made when it is asked for, and once."""

    place: Path
    made: dict[str, Path] = field(default_factory=dict)

    def by(self, recipe: str) -> Path:
        """The folder of a recipe, which stays as it is."""
        if recipe not in self.made:
            folder = self.place / recipe
            assert main(["prune", "demo", "--recipe", recipe, *OPTIONS, "--output", str(folder)]) == 0
            self.made[recipe] = folder
        return self.made[recipe]
