"""What a run reports, on the way and at the end, and what a folder of weights says of itself."""

from optprune.report.dead_units import DeadUnits
from optprune.report.drawings import pictures
from optprune.report.evaluated import Evaluated, Speed, evaluation_in, read_evaluation, read_speed
from optprune.report.events import (
    BlockFinished,
    BlockStarted,
    DivergenceMeasured,
    Event,
    LayerSolved,
    PhaseAdvanced,
    PhaseFinished,
    PhasesExpected,
    PhaseStarted,
)
from optprune.report.folder_audit import Audit, audit
from optprune.report.healed import Healed, healed_in
from optprune.report.held import Held, held_in
from optprune.report.html_page import page
from optprune.report.layer_pattern import BrokenGroups, LayerPattern, broken_groups, layer_pattern, model_patterns
from optprune.report.original import Original, original_of, shares_kept
from optprune.report.phases import PHASES, PhaseReport, joined
from optprune.report.reading import read_report
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
