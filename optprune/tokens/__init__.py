"""Tokens as units: a smaller vocabulary, its tokenizer, and the rows of the embedding and the head that stay."""

from optprune.tokens.rows import keep_rows
from optprune.tokens.tokenizer import SmallerVocabulary, choose_tokens

__all__ = ["SmallerVocabulary", "choose_tokens", "keep_rows"]
