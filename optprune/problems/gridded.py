"""Least squares on a grid: the weights that a low-bit format can store, on a fixed mask."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.grids import Codes, Grid
from optprune.metric import OutputBasis
from optprune.problems.base import Problem
from optprune.problems.loss import LayerLoss
from optprune.problems.masked import MaskedLeastSquares


@final
@dataclass(frozen=True, eq=False)
class GridLeastSquares(Problem):
    """minimise f(V) subject to V on the grid, and V_ij = 0 wherever the mask is False.

    V [out, in]; the mask is [out, in], or [1, in] when all rows share it; without one it is all True. On the grid means
    V_ij = s_ib q_ij with an integer q and one scale s for each block b of a row (`Grid`). Mixed-integer; rows are
    independent unless the loss has a full output metric. f is the LayerLoss, in (output)^2 per token. Without the grid
    it is `relaxed`, whose optimum is a lower bound.

    Reference: the layer problem of GPTQ (arXiv 2210.17323) and, with a mask, of SparseGPT (arXiv 2301.00774, 3.5).
    """

    kind: ClassVar[str] = "grid least squares"

    loss: LayerLoss
    grid: Grid
    mask: Bool[Tensor, "rows in"] | None = None

    def __post_init__(self) -> None:
        self.grid.check_width(self.loss.weight.shape[1])
        _ = self.relaxed  # which checks the mask

    @property
    def kept(self) -> Bool[Tensor, "rows in"]:
        """The mask; all True where there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones_like(self.loss.weight[:1], dtype=torch.bool)

    @property
    def relaxed(self) -> MaskedLeastSquares:
        """The restoration problem on the same mask, without the grid."""
        return MaskedLeastSquares(self.loss, self.kept)

    def objective(self, weight: Float[Tensor, "out in"]) -> float:
        return self.relaxed.objective(weight)

    def measuring_error(self, weight: Float[Tensor, "out in"]) -> float:
        return self.relaxed.measuring_error(weight)

    def violation(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the number of blocks off the grid plus that of non-zero entries outside the mask."""
        return float(self.grid.off(weight) + int(((weight != 0) & ~self.kept).sum()))

    def start(self) -> Float[Tensor, "out in"]:
        """Return the original weights, rounded by the importance of their inputs."""
        return self.rounded(self.loss.weight)

    def rounded(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return a weight on the mask, rounded with scales that are chosen by the diagonal of A."""
        size = self.loss.input_scale
        return self.grid.nearest(self._inside(weight), (size / size.max()).square().to(weight)).values()

    def project(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return a feasible weight near a weight, each block by the least square error of the scales tried."""
        return self.grid.nearest(self._inside(weight)).values()

    def codes(self, weight: Float[Tensor, "out in"]) -> Codes:
        """Return the codes of a feasible weight, and of its projection for another one."""
        inside = self._inside(weight)
        codes, off = self.grid.find(inside)
        return self.grid.nearest(inside) if bool(off.any()) else codes

    def _inside(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return torch.where(self.kept, weight, 0.0)

    def inputs(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, " in"]:
        """Return the inputs that the mask leaves to some output."""
        return self.relaxed.inputs(weight)

    def in_output_basis(self) -> "tuple[Problem, OutputBasis | None]":
        """Return the problem itself: another basis of the outputs would leave the grid."""
        return self, None

    def in_moderate_units(self) -> tuple[Problem, float, float]:
        # Weights keep their unit, in which scales are stored.
        loss, weights, objective = self.loss.in_moderate_units(of_weights=False)
        return (self if loss is self.loss else replace(self, loss=loss)), weights, objective

    def trivial_solution(self, start: Tensor) -> Tensor | None:
        return self.codes(start).values() if self.loss.dead else None
