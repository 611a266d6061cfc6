"""Calibration: passes of a text through the model, along a propagation policy, reduced to statistics."""

from optprune.calibration.dense_statistics import BlockMoments, DensePass, DenseStatistics, KnownMoments, Statistics
from optprune.calibration.divergence import Change, Probe
from optprune.calibration.expert_use import ExpertUse, UseByText, expert_use
from optprune.calibration.fisher_pass import collect_metrics, from_text, sampled
from optprune.calibration.generated import generated_windows, with_generated
from optprune.calibration.propagation import POLICIES, OnePath, Path, Propagation, TwoPaths, Visit
from optprune.calibration.statistics_cache import Source
from optprune.calibration.stream import Stream, advance, calibrating, first_inputs, first_tokens, hold_out

__all__ = [
    "POLICIES",
    "BlockMoments",
    "Change",
    "DensePass",
    "DenseStatistics",
    "ExpertUse",
    "KnownMoments",
    "OnePath",
    "Path",
    "Probe",
    "Propagation",
    "Source",
    "Statistics",
    "Stream",
    "TwoPaths",
    "UseByText",
    "Visit",
    "advance",
    "calibrating",
    "collect_metrics",
    "expert_use",
    "first_inputs",
    "first_tokens",
    "from_text",
    "generated_windows",
    "hold_out",
    "sampled",
    "with_generated",
]
