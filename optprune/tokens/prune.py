"""Pruning of a vocabulary: tokens chosen by a text, and rows of embedding and head refitted on it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models import LoadedModel, need_tokenizer
from optprune.report import Event, PhaseAdvanced, VocabularyChange
from optprune.report.phases import VOCABULARY
from optprune.texts import Text, tokenise
from optprune.texts.windows import begin_tokens, drawn_windows
from optprune.tokens.head import HeadMatching, match_head
from optprune.tokens.rows import TokenRows, config_ids, keep_rows
from optprune.tokens.states import States, expected_counts, read_states
from optprune.tokens.targets import PushForward
from optprune.tokens.token_models import Counts
from optprune.tokens.tokenizer import SmallerVocabulary, check_keep, choose_tokens, weighted_counts

LENGTH = 256
"""the length of the windows that rows are refitted on, in tokens"""
HELD_OUT = 8
"""one of so many windows is held out, and decides when to stop"""
RIDGE = 0.0
"""the ridge of the rows, in nats for a mean square change of logits of one"""


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens that stay, and the text that rows are refitted on, as plain data."""

    kept: tuple[int, ...]
    """the old ids of the tokens"""
    windows: tuple[tuple[int, ...], ...] | None
    """windows of old token ids; None where nothing is refitted"""


@dataclass(frozen=True, eq=False)
class VocabularyPruning:
    """A smaller vocabulary for a model that need not be loaded yet, and the text that its rows are refitted on."""

    vocabulary: SmallerVocabulary
    windows: Tensor | None
    """windows [n, length] of old token ids; None where nothing is refitted"""
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, chosen: ChosenTokens, seed: int = 0) -> "VocabularyPruning":
        """Return the pruning to tokens of a tokenizer that were chosen earlier."""
        windows = None if chosen.windows is None else torch.tensor(chosen.windows)
        return cls(SmallerVocabulary.of(tokenizer, chosen.kept), windows, seed)

    def chosen(self) -> ChosenTokens:
        """Return what is decided by the text and by the predictions of the model."""
        windows = None if self.windows is None else tuple(map(tuple, self.windows.tolist()))
        return ChosenTokens(self.vocabulary.kept, windows)

    @classmethod
    def planned(
        cls,
        tokenizer: Tokenizer,
        config: PretrainedConfig,
        texts: Sequence[Text],
        keep: float,
        *,
        tokens: int = 32768,
        predictions: int = 0,
        expected: Callable[[Tensor], Counts] | None = None,
        seed: int = 0,
    ) -> "VocabularyPruning":
        """Return the pruning to `keep` tokens, or that share, by texts; `tokens` of them are for refitting.

        `expected` returns how often the model expects each token behind those of windows [n, length], about
        `predictions` tokens, as `expected_counts` does. These counts, scaled to the length of the texts, are added to
        those of the texts: of two tokens that a text lacks, or has once, the one stays that the model expects more.

        InputError where the tokenizer cannot have fewer tokens, or `keep` is too small or too large; and for models
        whose logits are no linear function of the rows of the head, unless `tokens` is 0.
        """
        if tokens and getattr(config, "final_logit_softcapping", None):
            raise InputError(
                "the logits of the model are capped, so that the rows of its head cannot be refitted: set "
                "vocabulary.tokens to 0"
            )
        rows, also = int(config.vocab_size), config_ids(config)
        check_keep(tokenizer, rows, keep, also=also)
        read = [(tokenise(tokenizer, text.documents), float(text.share)) for text in texts]
        begin = begin_tokens(tokenizer)
        counts = weighted_counts(read, rows)
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        length = int(min(LENGTH, positions))
        if expected is not None and predictions:
            windows = _drawn(read, -(-predictions // length), length, seed, begin)
            if len(windows):
                # Rounded, so that no choice depends on the rounding of sums.
                counts = counts + np.round(expected(windows) * (counts.sum() / windows.numel()), 2)
        vocabulary = choose_tokens(tokenizer, counts, keep, also=also)
        if not tokens or len(vocabulary.kept) == len(vocabulary.pieces):
            return cls(vocabulary, None, seed)
        most = max(map(len, vocabulary.pieces.values()))
        if most > positions:
            raise InputError(
                f"a token that is removed becomes {most} that stay, more than the {positions} positions of the model: "
                "keep more tokens, or set vocabulary.tokens to 0"
            )
        return cls(vocabulary, _windows(read, tokens // length, length, seed, begin), seed)

    def apply(
        self, loaded: LoadedModel, on_event: Callable[[Event], None] = lambda event: None
    ) -> tuple[LoadedModel, VocabularyChange]:
        """Prune the vocabulary of a loaded model in place, and return it with its new tokenizer and a record."""
        began, rows = time.perf_counter(), TokenRows.of(loaded.model)
        parameters = loaded.model.num_parameters()
        matched = states = None
        if self.windows is not None:
            push = PushForward(self.vocabulary, rows.count)
            states = self._states(loaded, push, on_event)
            kept = torch.tensor(self.vocabulary.kept)[push.receiving].to(rows.head.weight.device)
            bias = None if rows.head.bias is None else rows.head.bias.detach()[kept].float()
            fitted, held_out = _held_out(states)
            problem = HeadMatching(fitted, rows.head.weight.detach()[kept].float(), bias, RIDGE)
            matched = match_head(problem, held_out, seed=self.seed)
            rows.head.weight.data[kept] = matched.rows.to(rows.head.weight.dtype)
        before = rows.count
        smaller = keep_rows(loaded, self.vocabulary)
        return smaller, VocabularyChange(
            before=before,
            after=len(self.vocabulary.kept),
            parameters_removed=parameters - smaller.model.num_parameters(),
            tokens=0 if self.windows is None else self.windows.numel(),
            divergence_before=None if matched is None else matched.before,
            divergence_after=None if matched is None else matched.after,
            seconds=time.perf_counter() - began,
        )

    def _states(self, loaded: LoadedModel, push: PushForward, on_event: Callable[[Event], None]) -> States:
        assert self.windows is not None
        step = "reading predictions of the removed tokens"

        def on_window(done: int, windows: int) -> None:
            on_event(PhaseAdvanced(VOCABULARY, step, "window", done, windows))

        return read_states(loaded, push, self.windows, seed=self.seed, on_window=on_window)


def prune_vocabulary(
    loaded: LoadedModel,
    texts: Sequence[Text],
    keep: float,
    *,
    tokens: int = 32768,
    predictions: int = 65536,
    seed: int = 0,
) -> tuple[LoadedModel, VocabularyChange]:
    """Prune the vocabulary of a loaded model in place, and return it with its new tokenizer and a record of the change.

    The `keep` tokens that the texts need most stay, or that share of all tokens, by their counts in the texts and in
    the model's predictions behind about `predictions` tokens of them (0: in the texts alone); about `tokens` tokens of
    the texts decide how the rows that stay take over the probability of the others (0: they do not). InputError as in
    `VocabularyPruning.planned`.
    """
    tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
    config = loaded.model.config
    planned = VocabularyPruning.planned(
        tokenizer,
        config,
        texts,
        keep,
        tokens=tokens,
        predictions=predictions,
        expected=partial(expected_counts, loaded),
        seed=seed,
    )
    return planned.apply(loaded)


def _windows(read: Sequence[tuple[Tensor, float]], count: int, length: int, seed: int, begin: Sequence[int]) -> Tensor:
    """Return the windows of `_drawn` in a random order; InputError where there are fewer than two."""
    windows = _drawn(read, count, length, seed, begin)
    if len(windows) < 2:
        raise InputError(
            f"the text is too short to refit the rows of the vocabulary, which takes at least two windows of {length} "
            "tokens: give a longer text, or set vocabulary.tokens to 0"
        )
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _drawn(read: Sequence[tuple[Tensor, float]], count: int, length: int, seed: int, begin: Sequence[int]) -> Tensor:
    """Return about `count` windows [n, length] of texts of token ids [tokens] by their shares, or all there are."""
    found = [torch.zeros(0, length, dtype=torch.long)]
    for ids, share in read:
        samples = min(max(1, round(count * share)), len(ids) // length)
        if samples:
            found.append(drawn_windows(ids, samples, length, seed, begin=begin))
    return torch.cat(found)


def _held_out(states: States) -> tuple[States, States]:
    """Return the states to fit, and the last of them, which are held out."""
    fitted = len(states) - len(states) // HELD_OUT
    return states[slice(0, fitted)], states[slice(fitted, len(states))]
