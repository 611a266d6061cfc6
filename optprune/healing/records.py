"""What healing reports."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class HeldOut:
    """A measurement on the held-out windows."""

    step: int
    """how many steps were done by then"""
    divergence: float
    """KL(dense || model), in nats a prediction"""
    perplexity: float


@dataclass(frozen=True)
class HealReport:
    """What healing did; the section `healing` of report.json."""

    steps: int
    """the steps that were taken"""
    steps_planned: int
    """the steps that the text is enough for"""
    tokens: int
    """the tokens that were trained on, those of every epoch"""
    held_out_tokens: int
    seconds: float
    """the time of all steps and measurements, in seconds"""
    before: HeldOut
    after: HeldOut
    """the state that was kept: that of the least divergence, as it is stored"""
    dense_perplexity: float
    """the perplexity of the dense model on the same windows"""
    measured: tuple[HeldOut, ...]
    """all measurements on the way, the first before any step"""
    zeros: int
    """the number of weights that were zero and still are"""
    settings: dict[str, Any]
    run_facts: dict[str, Any] = field(default_factory=dict)
    """what decided the weights of a run with a folder: `--resume` compares it with a command's own"""

    @property
    def generated_windows(self) -> int:
        """How many windows of the text the dense model wrote itself."""
        return self.settings["generated"]

    @property
    def stopped_early(self) -> bool:
        """Whether the divergence had stopped falling before the text was at its end."""
        return self.steps < self.steps_planned

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        more = {"generated_windows": self.generated_windows, "stopped_early": self.stopped_early}
        return {**asdict(self), **more}
