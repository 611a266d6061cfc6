"""What a run reports, on the way and at the end, and what a folder of weights says of itself."""

from optprune.report.dead_units import DeadUnits
from optprune.report.events import (
    BlockFinished,
    BlockStarted,
    DivergenceMeasured,
    Event,
    LayerSolved,
    PhaseAdvanced,
    PhaseFinished,
    PhaseStarted,
)
from optprune.report.folder_audit import Audit, audit
from optprune.report.layer_pattern import BrokenGroups, LayerPattern, broken_groups, layer_pattern, model_patterns
from optprune.report.original import Original, layer_sizes, original_of, shares_kept
from optprune.report.phases import PHASES, PhaseReport, joined
from optprune.report.recorder import PhaseRecorder
from optprune.report.records import BlockChange, LayerReport, RecoveredPart, RemovedPart, Report
from optprune.report.stored import Fault

__all__ = [
    "PHASES",
    "Audit",
    "BlockChange",
    "BlockFinished",
    "BlockStarted",
    "BrokenGroups",
    "DeadUnits",
    "DivergenceMeasured",
    "Event",
    "Fault",
    "LayerPattern",
    "LayerReport",
    "LayerSolved",
    "Original",
    "PhaseAdvanced",
    "PhaseFinished",
    "PhaseRecorder",
    "PhaseReport",
    "PhaseStarted",
    "RecoveredPart",
    "RemovedPart",
    "Report",
    "audit",
    "broken_groups",
    "joined",
    "layer_pattern",
    "layer_sizes",
    "model_patterns",
    "original_of",
    "shares_kept",
]
