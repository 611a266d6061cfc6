"""The choice of a vocabulary's tokens, the tokenizer with these tokens alone, and the pieces of the removed ones."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast

from optprune.errors import InputError
from optprune.system.wording import counted
from optprune.tokens.token_models import Counts, TokenModel, token_model

ATTRIBUTES = (
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "model_input_names",
)
"""what a tokenizer has beside its tokenizer.json"""


@dataclass(frozen=True, eq=False)
class SmallerVocabulary:
    """The tokens of a vocabulary that stay, with the tokenizer of these tokens.

    Kept tokens stay in their order, so that the new ids are 0, 1, 2 and so on by increasing old ids.
    """

    kept: tuple[int, ...]
    """the old ids of the kept tokens, by their new ids"""
    tokenizer: Tokenizer
    """the tokenizer that writes any text with the kept tokens"""
    before: Tokenizer
    """the tokenizer of all tokens"""

    @classmethod
    def of(cls, tokenizer: Tokenizer, kept: Iterable[int]) -> "SmallerVocabulary":
        """Return the vocabulary of the tokens with these old ids; InputError for a tokenizer of another kind."""
        order = tuple(sorted(kept))
        return cls(order, _reduced(tokenizer, order), tokenizer)

    @classmethod
    def between(cls, before: Tokenizer, after: Tokenizer) -> "SmallerVocabulary | None":
        """Return the vocabulary of which the one tokenizer has all tokens and the other the kept ones.

        None where the other is no tokenizer that `of` makes of the first.
        """
        try:
            old, new = ({**token_model(data).ids, **_added(data)} for data in map(_data, (before, after)))
        except InputError:
            return None
        if len(new) >= len(old) or not new.keys() <= old.keys() or sorted(new.values()) != list(range(len(new))):
            return None
        kept = tuple(old[token] for token in sorted(new, key=lambda token: new[token]))
        if list(kept) != sorted(set(kept)):
            return None
        same = _data(_reduced(before, kept))["model"] == _data(after)["model"]
        return cls(kept, after, before) if same else None

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new ids by the old ones."""
        return {old: new for new, old in enumerate(self.kept)}

    @cached_property
    def pieces(self) -> dict[int, tuple[int, ...]]:
        """The new ids of the pieces of every old token, by its old id; a kept token is its only piece."""
        after = _data(self.tokenizer)
        added = _added(after)
        ids, segments = token_model(after).ids, _backend(self.tokenizer).model
        found = dict[int, tuple[int, ...]]()
        for text, old in token_model(_data(self.before)).ids.items():
            if old in self.new_ids:
                found[old] = (self.new_ids[old],)
            else:
                found[old] = tuple(
                    ids.get(piece.value, added.get(piece.value, -1)) for piece in segments.tokenize(text)
                )
        return found | {old: (new,) for old, new in self.new_ids.items()}


def choose_tokens(tokenizer: Tokenizer, counts: Counts, keep: float, *, also: Iterable[int] = ()) -> SmallerVocabulary:
    """Return the vocabulary of the `keep` tokens, or of that share of all, that are needed most.

    `counts` [rows] says how often each token occurs in the user's text, by the rows of the model's embedding; rows
    beyond the tokenizer have no token and are removed. Bytes (without bytes all characters), special and added tokens,
    and those with the ids `also` stay in any case. A token of merged bytes stays with the tokens that it is merged
    from. InputError where the tokenizer is neither BPE nor unigram, and where `keep` is less than the tokens that must
    stay or more than there are.
    """
    model, wanted, always = _choice(tokenizer, len(counts), keep, also)
    return SmallerVocabulary.of(tokenizer, model.choose(counts, wanted, always))


def check_keep(tokenizer: Tokenizer, rows: int, keep: float, *, also: Iterable[int] = ()) -> None:
    """Raise InputError where `choose_tokens` would for counts [rows]."""
    _choice(tokenizer, rows, keep, also)


def _choice(tokenizer: Tokenizer, rows: int, keep: float, also: Iterable[int]) -> tuple[TokenModel, int, set[int]]:
    """Return the model of a tokenizer, the number of tokens to keep, and the ids of those that stay in any case."""
    data = _data(tokenizer)
    model = token_model(data)
    added = {int(token["id"]) for token in data["added_tokens"]}
    every = {*model.ids.values(), *added}
    if max(every) >= rows:
        raise InputError(
            f"the tokenizer has the token {max(every)}, but the model has only {rows} embeddings: the tokenizer "
            "belongs to another model"
        )
    always = model.always() | added | {index for index in also if index in every}
    wanted = _count(keep, len(every))
    if wanted < len(always):
        raise InputError(
            f"a vocabulary of {counted(wanted, 'token')} is too small: {len(always)} tokens stay in any case, which "
            "are the bytes or characters and the special tokens"
        )
    if wanted > len(every):
        raise InputError(f"a vocabulary of {wanted} tokens is larger than that of the model, {len(every)}")
    return model, wanted, always


def _added(data: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the added tokens of a tokenizer by their texts."""
    return {token["content"]: int(token["id"]) for token in data["added_tokens"]}


def _count(keep: float, tokens: int) -> int:
    """Return a number of tokens, given as such or as a share below 1."""
    if keep <= 0 or (keep > 1 and keep != int(keep)):
        raise InputError(
            f"the vocabulary to keep cannot be {keep}: give a number of tokens, or a share between 0 and 1"
        )
    return int(keep) if keep > 1 or isinstance(keep, int) else round(keep * tokens)


def weighted_counts(texts: Sequence[tuple[Tensor, float]], rows: int) -> Counts:
    """Return how often each of `rows` tokens occurs in texts of token ids [tokens], each weighted to its share."""
    total = sum(len(ids) for ids, _ in texts)
    found = np.zeros(rows)
    for ids, share in texts:
        found += np.bincount(ids.numpy(), minlength=rows)[:rows] * (share * total / max(1, len(ids)))
    return found


def _reduced(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
    """Return a tokenizer with the same rules that has these tokens alone, numbered in this order."""
    data, new = _data(tokenizer), {old: index for index, old in enumerate(kept)}
    smaller = {
        **data,
        "model": token_model(data).reduced(new),
        "added_tokens": [{**token, "id": new[token["id"]]} for token in data["added_tokens"]],
        "post_processor": _with_new_ids(data.get("post_processor"), new),
    }
    if data.get("padding"):
        smaller["padding"] = {**data["padding"], "pad_id": new[data["padding"]["pad_id"]]}
    attributes = {name: getattr(tokenizer, name) for name in ATTRIBUTES if getattr(tokenizer, name, None) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(smaller)),
        **attributes,
        **tokenizer.special_tokens_map,
    )


def _with_new_ids(rule: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor whose special tokens have their new ids: "ids" of templates, and pairs [text, id]."""
    if isinstance(rule, list):
        if len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], int):
            return [rule[0], new[rule[1]]]
        return [_with_new_ids(each, new) for each in rule]
    if isinstance(rule, dict):
        return {
            name: [new[index] for index in value] if name == "ids" else _with_new_ids(value, new)
            for name, value in rule.items()
        }
    return rule


def digest_of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 hex digest of the tokens of a tokenizer and of its rules."""
    return hashlib.sha256(_backend(tokenizer).to_str().encode()).hexdigest()


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if not tokenizer.is_fast:
        raise InputError("the tokenizer has no tokenizer.json, which holds its tokens: save it as a fast one")
    # Every fast tokenizer has this attribute; the base class does not declare it.
    return tokenizer.backend_tokenizer  # type: ignore[attr-defined]


def _data(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(_backend(tokenizer).to_str())
