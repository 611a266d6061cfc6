"""Calibration: what the text does inside the model, along a propagation policy, reduced to statistics."""

from optprune.calibration.dense_statistics import DenseStatistics
from optprune.calibration.divergence import Change, Probe
from optprune.calibration.fisher_pass import collect_metrics
from optprune.calibration.propagation import POLICIES, OnePath, Path, Propagation, TwoPaths, Visit
from optprune.calibration.stream import Stream, calibrating, first_inputs, first_tokens, hold_out

__all__ = [
    "POLICIES",
    "Change",
    "DenseStatistics",
    "OnePath",
    "Path",
    "Probe",
    "Propagation",
    "Stream",
    "TwoPaths",
    "Visit",
    "calibrating",
    "collect_metrics",
    "first_inputs",
    "first_tokens",
    "hold_out",
]
