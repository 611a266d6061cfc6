"""Events: what a run tells on the way."""

from collections.abc import Mapping
from dataclasses import dataclass

from optprune.report.phases import PhaseReport
from optprune.report.records import LayerReport


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of the run begins, or goes on after another; its name is one of `PHASES`."""

    phase: str


@dataclass(frozen=True)
class PhasesExpected:
    """More is known of the seconds that phases to come will take."""

    seconds: Mapping[str, float]
    """the seconds of each phase, by its name"""


@dataclass(frozen=True)
class PhaseAdvanced:
    """How far a step of a phase is; nothing is done when it begins."""

    phase: str
    """the name of the phase, one of `PHASES`"""
    step: str
    """what is being done, in words such as "measuring the output metric" """
    unit: str
    """the name of what is counted, such as block"""
    done: int
    total: int
    begins: float = 0.0
    """the share of the phase's work that comes before this step"""
    ends: float = 1.0
    """the share that is done after it"""
    within: float | None = None
    """the share of the step that is done, where what is counted is not all alike"""

    @property
    def share_of_step(self) -> float:
        """The share of the step that is done."""
        return self.within if self.within is not None else self.done / self.total if self.total else 1.0

    @property
    def share(self) -> float:
        """The share of the phase's work that is done."""
        return self.begins + (self.ends - self.begins) * self.share_of_step


@dataclass(frozen=True)
class PhaseFinished:
    """A phase is over, for now: what it took."""

    phase: PhaseReport


@dataclass(frozen=True)
class BlockStarted:
    """A decoder block is about to be calibrated."""

    block: int
    blocks: int
    done: int | None = None
    """how many blocks are done, where that is not all those before it"""
    layers: tuple[float, ...] = ()
    """the layers that will be solved in it, in their order: the share of the solving that each is, roughly"""


@dataclass(frozen=True)
class LayerSolved:
    """A layer's problem was solved and its answer written."""

    layer: LayerReport


@dataclass(frozen=True)
class BlockFinished:
    """A decoder block is pruned and its outputs are known."""

    block: int
    blocks: int
    seconds: float
    done: int | None = None
    """how many blocks are done, where that is not all up to it"""


@dataclass(frozen=True)
class DivergenceMeasured:
    """The predictions on held-out windows were held against the dense model's, while a model is healed."""

    step: int
    """how many steps were done by then"""
    steps: int
    divergence: float
    """KL(dense || model), in nats a prediction"""
    perplexity: float
    best: bool
    """whether no measurement before gave less"""


Event = (
    PhasesExpected
    | PhaseStarted
    | PhaseAdvanced
    | PhaseFinished
    | BlockStarted
    | LayerSolved
    | BlockFinished
    | DivergenceMeasured
)
