"""What every pruning problem is: it measures any candidate, and it knows no solver."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from optprune.metric import OutputBasis
from optprune.numerics.fingerprint import fingerprint
from optprune.problems.loss import LayerLoss


@dataclass(frozen=True, eq=False)
class Problem(ABC):
    """minimise objective(V) over the V with violation(V) = 0, where V [out, in] is a layer's new weight.

    Concrete problems are frozen dataclasses: they can be printed, hashed by content and solved.
    """

    kind: ClassVar[str]
    """the name of this kind of problem in reports"""
    loss: LayerLoss

    @abstractmethod
    def objective(self, weight: Tensor) -> float:
        """The value to minimise, measured in float64."""

    @abstractmethod
    def violation(self, weight: Tensor) -> float:
        """How far the weight is from feasible; 0 exactly when it is feasible."""

    @abstractmethod
    def start(self) -> Tensor:
        """A feasible weight that costs nothing to find."""

    def measuring_error(self, weight: Tensor) -> float:
        """Return by how much `objective` may be off for the numbers as they are stored: a proven bound.

        A kind whose objective is more than the loss adds what the rest of it may be off by.
        """
        return self.loss.measuring_error(weight)

    def inputs(self, weight: Tensor) -> Tensor:
        """The inputs [in] that an answer reads, as a mask: with the others whole columns go, and what they make a unit.

        Here those with a weight that is not zero. A problem that chooses inputs itself says which it chose, so that an
        input whose weights only happen to be zero stays.
        """
        return (weight != 0).any(0)

    def in_output_basis(self) -> "tuple[Problem, OutputBasis | None]":
        """The problem in a basis of the outputs in which S is simpler, and that basis; objectives are the same numbers.

        Here diag(sqrt(S_ii)) V, which has the zeros of V, so that S keeps a unit diagonal. A kind that measures weights
        in another way than by the loss returns itself; its solvers then meet any S.
        """
        metric = self.loss.metric
        return (self, None) if metric is None else (replace(self, loss=self.loss.row_scaled()), metric.row_scaling)

    def in_moderate_units(self) -> "tuple[Problem, float, float]":
        """The problem in units of weights and inputs in which float32 squares are safe, the factor of the weights, and
        that of the objective; for a kind whose objective may be more than the loss it is the problem as it is.
        """
        return self, 1.0, 1.0

    def indifferent(self, start: Tensor) -> Tensor | None:
        """A feasible weight by a start, where all feasible weights cost the same; None where they need not."""
        return None

    def fingerprint(self) -> str:
        """A hash of the problem's content: the same problem has the same hash in every process."""
        return fingerprint(self)
