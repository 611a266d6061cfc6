"""Tokenising for a model, shared by prune, evaluate and heal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from optprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from optprune.cli.request import Resolved
    from optprune.texts import Document, DrawnWindows, Text
    from optprune.tokens import VocabularyPruning
    from optprune.tokens.token_models import Counts


def tokens_for(
    model: str, config: "PretrainedConfig", documents: "Sequence[Document]", most: int | None = None
) -> "Tensor":
    """Return the tokens of documents by a model's tokenizer, at most `most`; InputError for an unknown one."""
    from optprune.texts import check_vocabulary, tokenise

    with tokenizer_of(model) as tokenizer:
        tokens = tokenise(tokenizer, documents, most)
    check_vocabulary(config, tokens)
    return tokens


def calibration_of(
    resolved: "Resolved", texts: "Sequence[Text]", sequences: str = "packed"
) -> "tuple[VocabularyPruning | None, DrawnWindows]":
    """Return the smaller vocabulary of a run, if its recipe has one, and the calibration windows in its tokens.

    Where the calibration is records, they are read by the processor and the vision part of the model.
    """
    from optprune.measure.memory import release
    from optprune.models import device_of
    from optprune.texts import check_vocabulary, draw_windows

    program, config = resolved.program, resolved.config
    if resolved.records is not None:
        found = resolved.records.read(dtype=program.request.dtype, device=device_of(resolved.device))
        release()
        return None, found
    request, seed = program.request, program.seed
    smaller = vocabulary_for(resolved, texts)
    with tokenizer_of(resolved.model) as own:
        tokenizer = own if smaller is None else smaller.vocabulary.tokenizer
        drawn = draw_windows(tokenizer, texts, request.samples, request.seq_length, seed, sequences=sequences)
    for tokens in (drawn.first, *drawn.batches):
        check_vocabulary(config, tokens.flatten())
    return smaller, drawn


def vocabulary_for(resolved: "Resolved", texts: "Sequence[Text]") -> "VocabularyPruning | None":
    """Return the smaller vocabulary that a recipe asks for, chosen by texts; None where it asks for none."""
    program = resolved.program
    setting = program.request.recipe.vocabulary
    if setting is None:
        return None
    from optprune.tokens import VocabularyPruning

    with tokenizer_of(resolved.model) as tokenizer:
        return VocabularyPruning.planned(
            tokenizer,
            resolved.config,
            texts,
            setting.keep,
            tokens=setting.tokens,
            predictions=setting.predictions,
            expected=partial(_expected, resolved),
            seed=program.seed,
        )


def _expected(resolved: "Resolved", windows: "Tensor") -> "Counts":
    """Return how often the model of a run expects each token behind the tokens of windows [n, length]."""
    from optprune.measure.memory import release
    from optprune.models import load_model, open_model
    from optprune.models.draft import draft_in
    from optprune.models.store import NullSink
    from optprune.tokens import expected_counts

    request = resolved.program.request
    dtype, device, by = str(request.dtype).removeprefix("torch."), resolved.device, draft_in(resolved.config)
    if request.whole:
        loaded = load_model(resolved.model, dtype=dtype, device=device, architecture=by)
    else:
        loaded = open_model(resolved.model, sink=NullSink(), dtype=dtype, device=device, architecture=by)
    found = expected_counts(loaded, windows)
    del loaded
    release()
    return found


@contextmanager
def tokenizer_of(model: str) -> "Iterator[Tokenizer]":
    """Yield the tokenizer of a model source; InputError where there is none, or it fails within the context."""
    from optprune.models import load_tokenizer, need_tokenizer, using_tokenizer

    tokenizer = need_tokenizer(load_tokenizer(model), model)
    with using_tokenizer(model):
        yield tokenizer


def check_alike(
    model: str,
    config: "PretrainedConfig",
    against: str,
    tokens: "Tensor",
    others: "Callable[[PretrainedConfig], Tensor]",
) -> None:
    """Raise InputError unless two models can be compared, with the same vocabulary and tokenizer.

    `tokens` are those of a text by the first model's tokenizer; `others` gives those by the second's.
    """
    import torch

    from optprune.models import load_config, load_tokenizer
    from optprune.models.draft import draft_in

    other = load_config(against, draft_in(config))
    sizes = [one.get_text_config().vocab_size for one in (config, other)]
    same = sizes[0] == sizes[1]
    if same and load_tokenizer(against) is not None:
        same = torch.equal(others(other), tokens)
    if not same:
        raise InputError(
            f"{model} and {against} have different tokens, so their predictions cannot be compared: name the model "
            "before pruning, or evaluate each alone and compare their bits per byte"
        )
