"""OSSCAR by its authors, as in fmchisel 0.1.2 (`pip install --no-deps fmchisel==0.1.2`)."""

import torch
from benchmark_utils.published import arguments, plain, published
from benchopt import BaseSolver
from torch import Tensor

from optprune.problems import Problem, StructuredLeastSquares

PRUNE = published("pruning/osscar/utils/osscar_sparsify.py").sparsify_weight


class Solver(BaseSolver):
    """OSSCAR: the local combinatorial search of arXiv 2403.12983."""

    name = "OSSCAR (fmchisel)"
    sampling_strategy = "run_once"
    requirements = ["pip::fmchisel"]
    parameters = {"updates": [1, 16]}

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is of another kind."""
        fits = isinstance(problem, StructuredLeastSquares) and problem.channels.slot_count == 1 and plain(problem.loss)
        ordered = fits and torch.equal(problem.channels.columns.reshape(-1), torch.arange(problem.loss.weight.shape[1]))
        return not ordered, "it takes channels in one slot and in their order, without metric and drift"

    def set_objective(self, problem: StructuredLeastSquares) -> None:
        """Take the problem."""
        self.problem = problem

    def run(self, _: object) -> None:
        """Prune the layer."""
        layer, grams = arguments(self.problem.loss)
        units = self.problem.channels.units
        _, weight = PRUNE(layer, grams, self.problem.keep, self.updates, units, percdamp=0.0)
        self.weight = weight.detach().to(self.problem.loss.weight)

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        return {"weight": self.weight}
