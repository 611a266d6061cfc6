"""Measures of a model: perplexity, speed, memory, time."""

from optprune.measure.evaluate import Evaluation, perplexity

__all__ = ["Evaluation", "perplexity"]
