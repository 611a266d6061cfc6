"""The base class of pruning problems: a problem measures any candidate, and it knows no solver."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from optprune.metric import OutputBasis
from optprune.numerics.fingerprint import fingerprint
from optprune.numerics.tensors import check_tensor
from optprune.problems.loss import LayerLoss


@dataclass(frozen=True)
class Measurement:
    """What a problem says of a weight, whoever found it."""

    objective: float
    violation: float
    """0 exactly where the weight is feasible"""


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
        """Return the value to minimise, measured in float64."""

    @abstractmethod
    def violation(self, weight: Tensor) -> float:
        """Return how far the weight is from feasible; 0 exactly when it is feasible."""

    @abstractmethod
    def start(self) -> Tensor:
        """Return a feasible weight that costs nothing to find."""

    def measure(self, weight: Tensor) -> Measurement:
        """Return the objective and the violation of a weight [out, in]. InputError for a weight of another shape."""
        check_tensor("the weight", weight, self.loss.weight.shape)
        return Measurement(self.objective(weight), self.violation(weight))

    def measuring_error(self, weight: Tensor) -> float:
        """Return a proven bound of the rounding error of `objective`, for the problem's numbers as stored.

        A kind whose objective has more terms than the loss adds their rounding error.
        """
        return self.loss.measuring_error(weight)

    def inputs(self, weight: Tensor) -> Tensor:
        """Return the mask [in] of the inputs that an answer uses: the columns of all others can be removed.

        By default these are the inputs with a non-zero weight. A problem that chooses inputs returns its choice, so
        that an input whose weights happen to be zero stays.
        """
        return (weight != 0).any(0)

    def in_output_basis(self) -> "tuple[Problem, OutputBasis | None]":
        """Return the problem in a basis of the outputs in which S is simpler, and that basis. Objectives stay the same.

        By default the basis is diag(sqrt(S_ii)): it keeps the zeros of V, and S gets a unit diagonal. A kind whose
        objective has other terms than the loss returns itself; its solvers then have to handle any S.
        """
        metric = self.loss.metric
        return (self, None) if metric is None else (replace(self, loss=self.loss.row_scaled()), metric.row_scaling)

    def in_moderate_units(self) -> "tuple[Problem, float, float]":
        """Return the problem in units in which squares stay in the range of float32, and the factors of weights and
        objective. A kind whose objective may have other terms than the loss returns itself.
        """
        return self, 1.0, 1.0

    def trivial_solution(self, start: Tensor) -> Tensor | None:
        """Return a feasible weight near a start where all feasible weights cost the same; None where they may not."""
        return None

    def fingerprint(self) -> str:
        """Return a hash of the problem's content, the same in every process."""
        return fingerprint(self)
