"""Measures of a model: perplexity, speed, memory, time."""

from optprune.measure.evaluate import Evaluation, perplexity
from optprune.measure.speed import Measured, ModelSpeed, Ratios, Work, measure_speed

__all__ = ["Evaluation", "Measured", "ModelSpeed", "Ratios", "Work", "measure_speed", "perplexity"]
