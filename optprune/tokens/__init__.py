"""Tokens as units: a smaller vocabulary, its tokenizer, and the rows of embedding and head that stay, refitted."""

from optprune.tokens.head import HeadMatching, MatchedHead, match_head
from optprune.tokens.prune import VocabularyPruning, prune_vocabulary
from optprune.tokens.rows import keep_rows
from optprune.tokens.states import States, expected_counts
from optprune.tokens.targets import PushForward
from optprune.tokens.teacher import PushedTeacher
from optprune.tokens.tokenizer import SmallerVocabulary, choose_tokens

__all__ = [
    "HeadMatching",
    "MatchedHead",
    "PushForward",
    "PushedTeacher",
    "SmallerVocabulary",
    "States",
    "VocabularyPruning",
    "choose_tokens",
    "expected_counts",
    "keep_rows",
    "match_head",
    "prune_vocabulary",
]
