"""Texts: documents from files, data sets or the demo, tokenised once and cut into windows."""

from optprune.texts.calibration import (
    PACKED,
    SEQUENCES,
    DrawnWindows,
    Text,
    WindowSampler,
    begin_in_words,
    begin_of,
    check_sequences,
    draw_windows,
    read_texts,
)
from optprune.texts.documents import (
    FORMS,
    NAMED_SETS,
    Conversation,
    Document,
    NamedSet,
    demo_articles,
    normalised_text,
    read_documents,
)
from optprune.texts.held_out import TrainingText, split_held_out
from optprune.texts.records import DrawnRecords, Record, draw_records, read_records
from optprune.texts.windows import (
    begin_tokens,
    calibration_batches,
    check_seq_length,
    check_vocabulary,
    evaluation_windows,
    tokenise,
)

__all__ = [
    "FORMS",
    "NAMED_SETS",
    "PACKED",
    "SEQUENCES",
    "Conversation",
    "Document",
    "DrawnRecords",
    "DrawnWindows",
    "NamedSet",
    "Record",
    "Text",
    "TrainingText",
    "WindowSampler",
    "begin_in_words",
    "begin_of",
    "begin_tokens",
    "calibration_batches",
    "check_seq_length",
    "check_sequences",
    "check_vocabulary",
    "demo_articles",
    "draw_records",
    "draw_windows",
    "evaluation_windows",
    "normalised_text",
    "read_documents",
    "read_records",
    "read_texts",
    "split_held_out",
    "tokenise",
]
