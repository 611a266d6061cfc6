"""Texts: documents from files, data sets or the demo, tokenised once and cut into windows."""

from optprune.texts.calibration import SEQUENCES, Drawn, Draws, Text, check_sequences, draw_windows, read_texts
from optprune.texts.documents import FORMS, Conversation, Document, demo_articles, read_documents, words_of
from optprune.texts.held_out import TrainingText, with_held_out
from optprune.texts.windows import calibration_batches, check_seq_length, check_vocabulary, evaluation_windows, tokenise

__all__ = [
    "FORMS",
    "SEQUENCES",
    "Conversation",
    "Document",
    "Drawn",
    "Draws",
    "Text",
    "TrainingText",
    "calibration_batches",
    "check_seq_length",
    "check_sequences",
    "check_vocabulary",
    "demo_articles",
    "draw_windows",
    "evaluation_windows",
    "read_documents",
    "read_texts",
    "tokenise",
    "with_held_out",
    "words_of",
]
