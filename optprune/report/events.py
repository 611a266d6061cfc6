"""Events: what a run tells on the way."""

from dataclasses import dataclass

from optprune.report.records import LayerReport


@dataclass(frozen=True)
class PhaseAdvanced:
    """How far a phase is that comes before the blocks are pruned; nothing is done when it begins."""

    phase: str
    unit: str
    """the name of what is counted, such as block"""
    done: int
    total: int


@dataclass(frozen=True)
class BlockStarted:
    """A decoder block is about to be calibrated."""

    block: int
    blocks: int
    done: int | None = None
    """how many blocks are done, where that is not all those before it"""


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
class PartsScored:
    """A round of scores of whole sub-blocks is done; what is removed so far, of what is to be removed."""

    weights: int
    budget: int


@dataclass(frozen=True)
class BlockMeasured:
    """It is known what the layers of a dense block would lose by pruning, for a budget over the whole model."""

    block: int
    blocks: int


Event = PhaseAdvanced | BlockStarted | LayerSolved | BlockFinished | PartsScored | BlockMeasured
