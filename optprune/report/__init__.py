"""What a run reports, on the way and at the end, and what a folder of weights says of itself."""

from optprune.report.audit import LayerPattern, layer_pattern, model_patterns
from optprune.report.events import (
    BlockFinished,
    BlockMeasured,
    BlockStarted,
    Event,
    LayerSolved,
    PartsScored,
    PhaseAdvanced,
)
from optprune.report.original import Original, layer_sizes, original_of, shares_kept
from optprune.report.records import BlockChange, LayerReport, RecoveredPart, RemovedPart, Report

__all__ = [
    "BlockChange",
    "BlockFinished",
    "BlockMeasured",
    "BlockStarted",
    "Event",
    "LayerPattern",
    "LayerReport",
    "LayerSolved",
    "Original",
    "PartsScored",
    "PhaseAdvanced",
    "RecoveredPart",
    "RemovedPart",
    "Report",
    "layer_pattern",
    "layer_sizes",
    "model_patterns",
    "original_of",
    "shares_kept",
]
