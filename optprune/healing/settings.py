"""Settings of healing, and the learning rate of each step."""

import math
from dataclasses import dataclass

from optprune.calibration.generated import check_count
from optprune.errors import InputError
from optprune.errors import check_count as check_whole
from optprune.models import DTYPES
from optprune.system.wording import shown

LEARNING_RATE = 2e-4
MOST_EPOCHS = 10_000
MEASUREMENTS = 10
"""number of measurements on the held-out windows over a run, where `every` is not given"""


@dataclass(frozen=True, kw_only=True)
class HealingSettings:
    """Hyperparameters of `heal`. Values out of range raise InputError."""

    learning_rate: float = LEARNING_RATE
    """peak learning rate"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises"""
    weight_decay: float = 0.01
    """weight decay of matrices; norms and biases have none"""
    clip: float = 1.0
    """largest Euclidean norm of a step's gradient"""
    dtype: str = "float32"
    """dtype of the computation: float32, or bfloat16 for the products (autocast); weights are float32 meanwhile"""
    embeddings: bool = True
    """whether embeddings and the head are trained too"""
    gradient_checkpointing: bool = False
    """whether a block's inner activations are computed again for its gradient instead of being kept"""
    every: int | None = None
    """number of steps between measurements on the held-out windows; by default they are measured ten times"""
    patience: int = 3
    """number of measurements in a row without a smaller divergence after which the training ends, in the second half of
    its steps: before that the learning rate is still large"""
    seed: int = 0
    """seed of dropout, and of the order of batches in further epochs"""
    epochs: int = 1
    """number of passes over the batches"""
    generated: int = 0
    """number of windows that the teacher generates and that are mixed into the text"""

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
            problem = "has too small a range" if self.dtype in DTYPES else "is unknown"
            raise InputError(f"the dtype {self.dtype!r} {problem} for healing: use float32 or bfloat16")
        if self.every is not None and self.every < 1:
            raise InputError(f"the held-out windows cannot be measured after every {self.every} steps: give 1 or more")
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise InputError(f"the number of epochs cannot be {shown(self.epochs)}: give 1 to {MOST_EPOCHS}")
        check_count(self.generated)
        check_whole("the seed", self.seed)
        if self.patience < 1:
            raise InputError(f"the patience cannot be {self.patience} measurements: it is at least 1")

    def measured_after(self, steps: int) -> list[int]:
        """Return the steps, counted from 1, after which a run of `steps` steps measures; the last one is among them."""
        if self.every is not None:
            return [*range(self.every, steps, self.every), steps]
        count = min(steps, MEASUREMENTS)
        return [number * steps // count for number in range(1, count + 1)]

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0: a linear warm-up, then half a cosine down to 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
