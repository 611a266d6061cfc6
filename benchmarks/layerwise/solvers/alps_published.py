"""ALPS by its authors, as in fmchisel 0.1.2 (`pip install --no-deps fmchisel==0.1.2`)."""

from typing import Any

from benchmark_utils.published import arguments, plain, published
from benchopt import BaseSolver
from torch import Tensor

from optprune.patterns import NM, Unstructured
from optprune.problems import Problem, SparseLeastSquares

PRUNE = published("pruning/alps/utils/alps_sparsify.py").sparsify_weight


class Solver(BaseSolver):
    """ALPS: the operator splitting of arXiv 2406.07831, with its own settings."""

    name = "ALPS (fmchisel)"
    sampling_strategy = "run_once"
    requirements = ["pip::fmchisel"]

    def skip(self, problem: Problem) -> tuple[bool, str | None]:
        """Return whether the problem is of another kind."""
        fits = isinstance(problem, SparseLeastSquares) and isinstance(problem.pattern, Unstructured | NM)
        return not fits or not plain(problem.loss), "it takes sparse problems without metric and drift"

    def set_objective(self, problem: SparseLeastSquares) -> None:
        """Take the problem."""
        self.problem = problem

    def run(self, _: object) -> None:
        """Prune the layer."""
        loss, pattern = self.problem.loss, self.problem.pattern
        layer, grams = arguments(loss)
        options: dict[str, Any] = {"prunen": 0, "prunem": 0}
        if isinstance(pattern, NM):
            options = {"prunen": pattern.n, "prunem": pattern.m}  # they count what a group keeps
        kept = pattern.keep / loss.weight.numel() if isinstance(pattern, Unstructured) else pattern.n / pattern.m
        _, weight = PRUNE(layer, grams, sparsity=1 - kept, percdamp=0.0, **options)
        self.weight = weight.detach().to(loss.weight)

    def get_result(self) -> dict[str, Tensor]:
        """Return the answer."""
        return {"weight": self.weight}
