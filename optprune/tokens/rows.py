"""The rows of a model that belong to tokens: those of the embedding and of the head."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from optprune.errors import InputError
from optprune.models import LoadedModel
from optprune.system.wording import shown
from optprune.tokens.tokenizer import SmallerVocabulary

LISTED = ("suppress_tokens", "begin_suppress_tokens")
"""fields of a generation config that list tokens never to be written; a removed token is not written anyway"""
NAMED = ("bad_words_ids", "sequence_bias", "forced_decoder_ids", "force_words_ids")
"""fields of a generation config that name sequences of tokens, which may be written by other tokens afterwards"""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The weights of a model that have a row for each token."""

    embedding: nn.Embedding
    head: nn.Linear
    tied: bool
    """whether both share one weight"""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TokenRows":
        """Return the rows of a model; InputError where its vocabulary has other weights too, or none of these."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        kind = model.config.model_type
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise InputError(f"a {kind} model has no embedding and head of one row for each token to prune")
        rows = embedding.weight.shape[0]
        if head.weight.shape[0] != rows:
            raise InputError(
                f"the head of the model has {head.weight.shape[0]} rows and its embedding {rows}, so that they do not "
                "have the same tokens, and the vocabulary cannot be pruned"
            )
        own = {embedding.weight, head.weight, head.bias}
        for name, weight in model.named_parameters():
            of_tokens = "embed_tokens" in name or (weight.shape[0] == rows and "embed" in name)
            if of_tokens and all(weight is not each for each in own):
                raise InputError(
                    f"{name} has a row for each token too, beside the embedding and the head, so that the vocabulary "
                    "cannot be pruned"
                )
        return cls(embedding, head, head.weight is embedding.weight)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.embedding.weight.shape[0]


def check_ids(model: PreTrainedModel, vocabulary: SmallerVocabulary) -> None:
    """Raise InputError where the generation config names a removed token, or sequences of tokens."""
    generation = model.generation_config
    for name, value in () if generation is None else _id_fields(generation):
        gone = [index for index in _listed(value) if index in vocabulary.pieces and index not in vocabulary.new_ids]
        if gone and name not in LISTED:
            raise InputError(
                f"the generation config has {name} {gone[0]}, a token that the smaller vocabulary does not have: name "
                "another there"
            )
    for name in NAMED:
        value = getattr(generation, name, None)
        if value:
            raise InputError(
                f"the generation config has {name} {shown(value)}, whose tokens may be removed: delete it there, and "
                "state it in the new tokens afterwards"
            )


def config_ids(config: PretrainedConfig) -> set[int]:
    """Return the ids of the tokens that a config names, such as the end of a text."""
    return {index for _, value in _id_fields(config) for index in _listed(value) if index >= 0}


def keep_rows(loaded: LoadedModel, vocabulary: SmallerVocabulary) -> LoadedModel:
    """Give a model the rows of the kept tokens alone, and return it with the tokenizer of these tokens.

    The model is changed in place: its rows, its ids of special tokens, and the size of its vocabulary. An id of a
    config beyond the tokenizer, which no text has, becomes None.
    """
    model, kept = loaded.model, torch.tensor(vocabulary.kept, device=loaded.model.device)
    rows = TokenRows.of(model)
    check_ids(model, vocabulary)
    weights = [rows.embedding.weight.detach()[kept]]
    weights += [] if rows.tied else [rows.head.weight.detach()[kept]]
    bias = None if rows.head.bias is None else rows.head.bias.detach()[kept]
    padding = rows.embedding.padding_idx
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    rows = TokenRows.of(model)
    put_rows(rows, *weights)
    if bias is not None:
        rows.head.bias.data = bias
    if padding is not None:
        rows.embedding.padding_idx = vocabulary.new_ids.get(padding)
    for config in filter(None, (model.config, model.generation_config)):
        _put_ids(config, vocabulary)
    return replace(loaded, tokenizer=vocabulary.tokenizer)


def put_rows(rows: TokenRows, embedding: Tensor, head: Tensor | None = None) -> None:
    """Write the weights [tokens, hidden] of the embedding and of a head that is not tied to it, in their own dtype."""
    rows.embedding.weight.data = embedding.to(rows.embedding.weight.dtype)
    if rows.tied:
        rows.head.weight = rows.embedding.weight
    elif head is not None:
        rows.head.weight.data = head.to(rows.head.weight.dtype)


def _id_fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config with ids of tokens: their names and values."""
    for name, value in config.to_dict().items():
        if (name.endswith("_token_id") or name in LISTED) and value is not None:
            yield name, value


def _put_ids(config: Any, vocabulary: SmallerVocabulary) -> None:
    new = vocabulary.new_ids
    for name, value in list(_id_fields(config)):
        found = [index if index < 0 else new[index] for index in _listed(value) if index < 0 or index in new]
        setattr(config, name, (found or None) if isinstance(value, list) else next(iter(found), None))


def _listed(value: Any) -> list[int]:
    return [int(index) for index in value] if isinstance(value, list | tuple) else [int(value)]
