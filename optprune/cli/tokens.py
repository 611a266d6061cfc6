"""Tokenising for a model: what prune and evaluate share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import LongTensor, Tensor
    from transformers import PretrainedConfig


def tokens_for(model: str, config: "PretrainedConfig", documents: Sequence[str], most: int | None = None) -> "Tensor":
    """The tokens of a text by the tokenizer of a model, which must have an embedding for each of them.

    All of them, or `most`.
    """
    from optprune.models import load_tokenizer, need_tokenizer, using_tokenizer
    from optprune.texts import check_vocabulary, tokenise

    tokenizer = need_tokenizer(load_tokenizer(model), model)
    with using_tokenizer(model):
        tokens = tokenise(tokenizer, documents, most)
    check_vocabulary(config, tokens)
    return tokens


def calibration_for(
    model: str, config: "PretrainedConfig", documents: Sequence[str], samples: int, seq_length: int, seed: int
) -> "tuple[list[LongTensor], Tensor]":
    """The batches of windows that are drawn from a text, and its first window; the other tokens are gone."""
    from optprune.texts import calibration_batches

    tokens = tokens_for(model, config, documents)
    return calibration_batches(tokens, samples, seq_length, seed), tokens[:seq_length].long()
