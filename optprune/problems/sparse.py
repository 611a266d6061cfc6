"""Sparse least squares: the choice of the single weights to keep, under a pattern."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import check_kind
from optprune.patterns import Pattern
from optprune.problems.loss import LayerLoss
from optprune.problems.masked import SelectionProblem


@final
@dataclass(frozen=True, eq=False)
class SparseLeastSquares(SelectionProblem):
    """minimise f(V) over V and a mask M of the pattern subject to V_ij = 0 wherever M is False.

    V [out, in]; the pattern may be unstructured, row-wise, N:M or any other with an exact projection. Mixed-integer:
    convex in V once M is fixed (`restrict`). f is the LayerLoss, in (output)^2 per token.

    Reference: the layer problem of SparseGPT (arXiv 2301.00774), ALPS (arXiv 2406.07831) and FISTAPruner (arXiv
    2408.03728).
    """

    kind: ClassVar[str] = "sparse least squares"

    loss: LayerLoss
    pattern: Pattern

    def __post_init__(self) -> None:
        check_kind("the pattern", self.pattern, Pattern, "give an instance, e.g. NM(2, 4)")

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        return self.loss.value(weight)

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the number of non-zero entries beyond what the pattern can hold."""
        used = weight != 0
        return float((used & ~self.pattern.project(used.to(weight))).sum())

    def start(self) -> Float[Tensor, "out in"]:
        """Return the weights of largest magnitude, unchanged."""
        return torch.where(self.pattern.project(self.loss.weight.abs()), self.loss.weight, 0.0)

    def project(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return self.pattern.project(score)

    def mask(self, choice: Bool[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return choice

    def support(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return the non-zero entries, completed to the exact count by the entries of largest original magnitude.

        Of more non-zero entries than the pattern holds, those of largest original magnitude are left. Weights of dead
        inputs (zero on all tokens) count as all others, although no output of these tokens depends on them: they are in
        the support where they are not zero, and large ones complete it before small ones of other inputs.
        """
        used = weight != 0
        if self.pattern.admits(used):
            return used
        # In float64: next to the 1 of a used entry a small magnitude would be rounded away.
        size = self.loss.weight.abs().double()
        return self.pattern.project(size.div_(1 + size.max()).add_(used))
