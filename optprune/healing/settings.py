"""The settings of healing, and the learning rate that a step has by them."""

import math
from dataclasses import dataclass

from optprune.errors import InputError
from optprune.models import DTYPES
from optprune.system.wording import shown

LEARNING_RATE = 2e-4
MOST_EPOCHS, MOST_GENERATED = 10_000, 1_000_000
TIMES = 10
"""how often the held-out windows are measured over a run, where nobody says"""


@dataclass(frozen=True)
class Settings:
    """How a model is healed."""

    learning_rate: float = LEARNING_RATE
    """the highest that a step has"""
    warmup: float = 0.1
    """the share of the steps over which the learning rate rises"""
    weight_decay: float = 0.01
    """the decay of matrices; norms and biases have none"""
    clip: float = 1.0
    """the largest Euclidean norm of a step's gradient"""
    dtype: str = "float32"
    """what is computed in: float32, or bfloat16 for the products (autocast); the weights are float32 meanwhile"""
    gradient_checkpointing: bool = False
    """whether a block's inner activations are computed again for its gradient, and not kept"""
    every: int | None = None
    """after how many steps the held-out windows are measured; a tenth of all where it is not given"""
    patience: int = 3
    """after how many measurements that found no less divergence the training ends"""
    seed: int = 0
    """the seed of dropout, in models that have it, and of the order of batches in further epochs"""
    epochs: int = 1
    """how often the batches are gone through"""
    generated: int = 0
    """how many windows the teacher writes itself, beside those of the text"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"the learning rate cannot be {self.learning_rate}: it is more than 0, such as 2e-4")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"the warm-up cannot be {self.warmup} of the steps: it is between 0 and 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"the weight decay cannot be {self.weight_decay}: it is at least 0")
        if not self.clip > 0:
            raise InputError(f"gradients cannot be clipped to a norm of {self.clip}: it is more than 0")
        if self.dtype not in ("float32", "bfloat16"):
            known = f"{self.dtype!r} has not the range or digits" if self.dtype in DTYPES else f"not {self.dtype!r}"
            raise InputError(f"healing computes in float32 or bfloat16: {known}")
        if self.every is not None and self.every < 1:
            raise InputError(f"the held-out windows cannot be measured after every {self.every} steps: give 1 or more")
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise InputError(f"the text cannot be gone through {shown(self.epochs)} times: give 1 to {MOST_EPOCHS}")
        if not 0 <= self.generated <= MOST_GENERATED:
            raise InputError(f"the teacher cannot write {shown(self.generated)} windows: give 0 to {MOST_GENERATED}")
        if self.patience < 1:
            raise InputError(f"the patience cannot be {self.patience} measurements: it is at least 1")

    def interval(self, steps: int) -> int:
        """After how many steps the held-out windows are measured."""
        return self.every or max(1, steps // TIMES)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0: it rises in a line, then falls along half a cosine, to 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
