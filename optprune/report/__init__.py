"""Reports: events and records of a run, its progress, its page, and audits of stored weights."""

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
    EvaluationReport,
    HealingReport,
    SpeedReport,
    parse_evaluation,
    read_evaluation,
    read_healing,
    read_report,
    read_speed,
)
from optprune.report.records import (
    BlockChange,
    GoalReached,
    LayerReport,
    RecoveredPart,
    RemovedPart,
    Report,
    VocabularyChange,
)
from optprune.report.stored import Fault, ModelSummary, Original, original_from_report, shares_kept, summarise_model
from optprune.report.tracking import TrackedEvents
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
    "EvaluationReport",
    "Event",
    "Fault",
    "GoalReached",
    "HealingReport",
    "LayerPattern",
    "LayerReport",
    "LayerSolved",
    "ModelSummary",
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
    "SpeedReport",
    "TrackedEvents",
    "VocabularyChange",
    "audit",
    "broken_groups",
    "joined",
    "layer_pattern",
    "model_patterns",
    "original_from_report",
    "page",
    "parse_evaluation",
    "pictures",
    "read_evaluation",
    "read_healing",
    "read_report",
    "read_speed",
    "shares_kept",
    "summarise_model",
]
