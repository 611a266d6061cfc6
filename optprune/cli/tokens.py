"""Tokenising for a model, shared by prune, evaluate and heal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from optprune.calibration.peers import Peers
    from optprune.cli.request import Resolved
    from optprune.models import LoadedModel
    from optprune.models.store import BlockSink
    from optprune.pruning import Journal
    from optprune.report import PhaseRecorder
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


def begin_for(model: str, sequences: str = "packed") -> list[int]:
    """Return the token ids that windows begin with, by a model's tokenizer: see `begin_of`."""
    from optprune.texts import begin_of

    with tokenizer_of(model) as tokenizer:
        return begin_of(tokenizer, sequences)


def calibration_of(
    resolved: "Resolved",
    texts: "Sequence[Text]",
    sequences: str = "packed",
    smaller: "VocabularyPruning | None" = None,
) -> "DrawnWindows":
    """Return the calibration windows of a run, in the tokens of its smaller vocabulary where it has one.

    Where the calibration is records, they are read by the processor and the vision part of the model.
    """
    from optprune.measure.memory import release
    from optprune.models import device_of
    from optprune.texts import check_vocabulary, draw_windows

    program, config = resolved.program, resolved.config
    if resolved.records is not None:
        found = resolved.records.read(dtype=program.request.dtype, device=device_of(resolved.device))
        release()
        return found
    request, seed = program.request, program.seed
    with tokenizer_of(resolved.model) as own:
        tokenizer = own if smaller is None else smaller.vocabulary.tokenizer
        drawn = draw_windows(tokenizer, texts, request.samples, request.seq_length, seed, sequences=sequences)
    for tokens in (drawn.first, *drawn.batches):
        check_vocabulary(config, tokens.flatten())
    return drawn


def with_digests(resolved: "Resolved", texts: "Sequence[Text]") -> "Resolved":
    """Return the program of a run with digests of all that its smaller vocabulary is chosen by, if it has one."""
    program = resolved.program
    if program.request.recipe.vocabulary is None:
        return resolved
    from optprune.numerics.fingerprint import fingerprint
    from optprune.tokens.tokenizer import digest_of_tokenizer

    with tokenizer_of(resolved.model) as tokenizer:
        own = digest_of_tokenizer(tokenizer)
    request = replace(program.request, text=fingerprint([text.digest() for text in texts]), tokenizer=own)
    return replace(resolved, program=replace(program, request=request))


def vocabulary_for(
    resolved: "Resolved",
    texts: "Sequence[Text]",
    opened: "Callable[[BlockSink, Path | None], LoadedModel]",
    *,
    journal: "Journal | None",
    peers: "Peers",
    phases: "PhaseRecorder",
) -> "VocabularyPruning | None":
    """Return the smaller vocabulary that a recipe asks for, which a run that was begun has kept; None for none.

    Else it is chosen by the texts and the predictions of the dense model, which `opened` opens. The first process has
    the run folder, and keeps the tokens there when the run begins.
    """
    setting, seed = resolved.program.request.recipe.vocabulary, resolved.program.seed
    if setting is None:
        return None
    from pydantic import TypeAdapter

    from optprune.calibration.peers import from_first
    from optprune.models.store import NullSink
    from optprune.pruning.journal import CHOSEN_TOKENS
    from optprune.report.phases import CHOOSING
    from optprune.tokens import VocabularyPruning
    from optprune.tokens.prune import ChosenTokens

    def dense() -> "LoadedModel":
        return opened(NullSink(), None if journal is None else journal.scratch)

    parse = TypeAdapter(ChosenTokens).validate_python
    with phases.step(CHOOSING, "choosing tokens"), tokenizer_of(resolved.model) as tokenizer:
        chosen = from_first(peers, lambda: None if journal is None else journal.kept(CHOSEN_TOKENS, parse))
        if chosen is None:
            new = VocabularyPruning.planned(
                tokenizer,
                resolved.config,
                texts,
                setting.keep,
                tokens=setting.tokens,
                predictions=setting.predictions,
                expected=partial(_expected, dense, phases),
                seed=seed,
            )
            chosen = from_first(peers, new.chosen)
        return VocabularyPruning.of(tokenizer, chosen, seed)


def _expected(opened: "Callable[[], LoadedModel]", phases: "PhaseRecorder", windows: "Tensor") -> "Counts":
    """Return how often the dense model expects each token behind the tokens of windows [n, length]."""
    from optprune.measure.memory import release
    from optprune.report import PhaseAdvanced
    from optprune.report.phases import CHOOSING
    from optprune.tokens import expected_counts

    def on_window(done: int, total: int) -> None:
        phases.on_event(PhaseAdvanced(CHOOSING, "reading predictions", "window", done, total))

    found = expected_counts(opened(), windows, on_window)
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
