"""Measures of a model: perplexity, divergence from the dense one, questions, continuations, speed, memory."""

from optprune.measure.divergence import Divergence, StandardErrors, Stretch, divergence_from, divergence_of
from optprune.measure.evaluate import Evaluation, bits_per_byte, generate, perplexity
from optprune.measure.questions import Answers, Question, answer_questions, read_questions
from optprune.measure.speed import ModelSpeed, Ratios, Repeats, SpeedWorkload, measure_speed
from optprune.measure.tasks import Scores, Tasks

__all__ = [
    "Answers",
    "Divergence",
    "Evaluation",
    "ModelSpeed",
    "Question",
    "Ratios",
    "Repeats",
    "Scores",
    "SpeedWorkload",
    "StandardErrors",
    "Stretch",
    "Tasks",
    "answer_questions",
    "bits_per_byte",
    "divergence_from",
    "divergence_of",
    "generate",
    "measure_speed",
    "perplexity",
    "read_questions",
]
