"""Teachers: models whose predictions another model is trained towards."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from optprune.numerics.fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class Teacher(ABC):
    """Dense model with its predictions of the next token of the student's windows."""

    model: PreTrainedModel
    decides: ClassVar[str] = "divergence"
    """the measure on held-out windows by which the best state is kept"""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """The number of tokens that are predicted, which are those of the student."""

    @abstractmethod
    def hidden(self, ids: Tensor) -> Tensor:
        """Return states [windows, length, any] behind the token ids [windows, length] of the student."""

    @abstractmethod
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities [..., vocabulary] of the next token in float32, for states [..., any]."""

    def training_windows(self, ids: Tensor, seed: int) -> Tensor:
        """Return the token ids [windows, length] to train on in one step, made from windows of the text."""
        return ids

    @abstractmethod
    def check(self, ids: Tensor) -> None:
        """Raise InputError where the predictions of token ids [windows, length] are not those of the model."""

    def digest(self) -> str:
        """Return a digest of what decides the predictions."""
        return fingerprint(list(self.model.state_dict().items()))
