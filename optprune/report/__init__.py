"""What a run reports, on the way and at the end, and what a folder of weights says of itself."""

from optprune.report.drawings import pictures
from optprune.report.events import (
    BlockFinished,
    BlockStarted,
    DivergenceMeasured,
    Event,
    LayerSolved,
    PhaseAdvanced,
    PhaseFinished,
    PhaseRecorder,
    PhasesExpected,
    PhaseStarted,
)
from optprune.report.folder_audit import Audit, audit
from optprune.report.html_page import page
from optprune.report.phases import PHASES, PhaseReport, joined
from optprune.report.reading import (
    Evaluated,
    Healed,
    Speed,
    evaluation_in,
    healed_in,
    read_evaluation,
    read_report,
    read_speed,
)
from optprune.report.records import BlockChange, LayerReport, RecoveredPart, RemovedPart, Report
from optprune.report.stored import Fault, Held, Original, held_in, original_of, shares_kept
from optprune.report.zeros import BrokenGroups, DeadUnits, LayerPattern, broken_groups, layer_pattern, model_patterns

__all__ = [
    "PHASES",
    "Audit",
    "BlockChange",
    "BlockFinished",
    "BlockStarted",
    "BrokenGroups",
    "DeadUnits",
    "DivergenceMeasured",
    "Evaluated",
    "Event",
    "Fault",
    "Healed",
    "Held",
    "LayerPattern",
    "LayerReport",
    "LayerSolved",
    "Original",
    "PhaseAdvanced",
    "PhaseFinished",
    "PhaseRecorder",
    "PhaseReport",
    "PhaseStarted",
    "PhasesExpected",
    "RecoveredPart",
    "RemovedPart",
    "Report",
    "Speed",
    "audit",
    "broken_groups",
    "evaluation_in",
    "healed_in",
    "held_in",
    "joined",
    "layer_pattern",
    "model_patterns",
    "original_of",
    "page",
    "pictures",
    "read_evaluation",
    "read_report",
    "read_speed",
    "shares_kept",
]
