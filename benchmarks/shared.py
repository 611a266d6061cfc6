"""What rows of a study have in common, computed once: output metrics, and the removal curves of one budget.

A row of an ablation often differs from the one before in what is done with the same metric and the same curves, which
take half of its time. `Shared` keeps them for the next run of the same seed. A row is told the seconds that its run
would have taken alone, and no memory.
"""

from optprune import Recipe, Statistics


class Shared(Statistics):
    """What was measured for one seed; `spared` tells the seconds of the present run."""

    seed: int | None = None

    def begin(self, recipe: Recipe) -> None:
        """Start a run; what another seed left is dropped."""
        if recipe.seed != self.seed:
            self.seed = recipe.seed
            self.forget()
        self.spared = 0.0
