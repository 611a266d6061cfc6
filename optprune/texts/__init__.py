"""Texts: documents from files, data sets or the demo, tokenised once and cut into windows."""

from optprune.texts.demo import demo_articles
from optprune.texts.documents import FORMS, read_documents
from optprune.texts.held_out import TrainingText, with_held_out
from optprune.texts.windows import calibration_batches, check_seq_length, check_vocabulary, evaluation_windows, tokenise

__all__ = [
    "FORMS",
    "TrainingText",
    "calibration_batches",
    "check_seq_length",
    "check_vocabulary",
    "demo_articles",
    "evaluation_windows",
    "read_documents",
    "tokenise",
    "with_held_out",
]
