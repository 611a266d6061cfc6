"""Tokenising for a model: what prune and evaluate share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


def tokens_for(model: str, config: "PretrainedConfig", documents: Sequence[str]) -> "Tensor":
    """The tokens of a text by the tokenizer of a model, which must have an embedding for each of them."""
    from optprune.models import load_tokenizer, need_tokenizer, using_tokenizer
    from optprune.texts import check_vocabulary, tokenise

    tokenizer = need_tokenizer(load_tokenizer(model), model)
    with using_tokenizer(model):
        tokens = tokenise(tokenizer, documents)
    check_vocabulary(config, tokens)
    return tokens
