"""Comparing: every recipe at every sparsity on the same statistics, text and evaluator, in one table."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.calibration.statistics_cache import digest_of_weights
from optprune.comparison.asked import Asked, texts_apart
from optprune.comparison.folder import ComparisonFolder
from optprune.comparison.origins import origin_of
from optprune.comparison.picture import picture_of
from optprune.comparison.results import Comparison
from optprune.comparison.session import Session
from optprune.errors import InputError
from optprune.measure import SpeedWorkload
from optprune.models import LoadedModel, check_dtype, device_of, using_tokenizer
from optprune.models.draft import draft_in
from optprune.models.load import Described
from optprune.numerics.fingerprint import fingerprint
from optprune.recipe import Recipe
from optprune.report import Event
from optprune.system.environment import machine, versions
from optprune.system.files import real_path
from optprune.system.folders import check_manifest_folder
from optprune.texts import (
    Document,
    DrawnWindows,
    Text,
    WindowSampler,
    check_seq_length,
    check_sequences,
    check_vocabulary,
    evaluation_windows,
    tokenise,
)

NO_PICTURE = "there is no picture, which needs matplotlib: pip install 'optprune[plot]'"


def compare(
    model: str | Path | LoadedModel,
    recipes: Sequence[str | Recipe],
    sparsities: Sequence[float],
    *,
    calibration: str,
    text: str,
    samples: int = 128,
    seq_length: int = 2048,
    windows: int | None = None,
    seeds: int | Sequence[int] = 1,
    sequences: str = "packed",
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    architecture: Described | None = None,
    keep_models: bool = False,
    speed: SpeedWorkload | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Comparison:
    """Prune a model by each recipe at each sparsity, and tell what each costs in quality, and saves in size.

    `recipes` are names, .yaml files or recipes, of which `settings` set more fields; `calibration` is one text or
    several with shares as `read_texts` takes them, and `text` as `read_documents` does, without a document in common. A
    seed draws the `samples` windows of `seq_length` tokens, by `sequences` as `draw_windows` does; for `seeds` a number
    stands for the first ones from 0. Each model is evaluated on the first `windows` windows of the text, or all, and
    beside the dense model. What the cells of a seed have in common of the dense model is measured once (see `collect`).
    A cell that fails has its sentence in the table. With a `folder` each cell is kept once it is finished, a second
    call with the same options goes on, and the table is written there as comparison.md, comparison.json and, with
    matplotlib, comparison.svg. `architecture` is as in `load_model`. Models are kept, in models/ there, only with
    `keep_models`; `speed` is a `SpeedWorkload`, or None. `say` hears what is done, `on_event` how far each run is.
    """
    asked = Asked.of(recipes, sparsities, seeds, settings)
    check_dtype(dtype)
    device_of(device)
    if keep_models and folder is None:
        raise InputError("models are kept in the folder of the comparison: name one")
    check_sequences(sequences)
    if folder is not None:
        check_manifest_folder(real_path(Path(folder)), ComparisonFolder.noun)
    texts, documents = texts_apart(calibration, text)
    origin = origin_of(model, dtype, device, architecture)
    config, tokenizer = origin.config(), origin.tokenizer()
    check_seq_length(config, seq_length)
    if speed is not None:
        speed.check(origin.source, config)
    say(f"tokenising {calibration} and {text}")
    with using_tokenizer(origin.source):
        # Where a text is too short, that is told before anything is loaded.
        drawn = _drawn(tokenizer, config, texts, sequences, samples, seq_length, asked.seeds)
        held = _to_evaluate_on(tokenizer, config, documents, seq_length, windows)
    with ExitStack() as contexts:
        place = _folder(folder, contexts)
        say(f"loading {origin.source}")
        dense = origin.dense(place.work, whole=speed is not None)
        options = {
            "the model": origin.source,
            "the weights": digest_of_weights(dense.decoder()),
            "the dtype": str(dense.model.dtype),
            "the calibration text": calibration,
            "the evaluation text": text,
            "the sequences": sequences,
            "the samples": samples,
            "the length of a window": seq_length,
            "the windows evaluated": len(held),
            "the architecture": fingerprint(str(draft_in(config))),
            **asked.facts(),
            "the tokens": fingerprint([held, *(batch for each in drawn.values() for batch in each.batches)]),
            "whether speed is measured": speed is not None,
            "whether models are kept": keep_models,
            "the version": versions(),
            "the machine": machine(dense.model.device),
        }
        place.begin(options)
        session = Session(asked, origin, place, drawn, held, keep_models, speed, say, on_event, dense)
        comparison = Comparison(origin.source, session.dense(), session.measure(), options)
        place.conclude(comparison, picture_of(comparison) if find_spec("matplotlib") else None)
    return comparison


def _folder(folder: str | Path | None, contexts: ExitStack) -> ComparisonFolder:
    """Return the folder of a comparison for as long as the contexts last; a temporary one where none is named."""
    place = ComparisonFolder(folder or contexts.enter_context(tempfile.TemporaryDirectory(prefix="optprune-")))
    contexts.callback(place.close)
    return place


def _to_evaluate_on(
    tokenizer: Tokenizer, config: PretrainedConfig, documents: list[Document], seq_length: int, windows: int | None
) -> Tensor:
    """The windows [n, seq_length] of the evaluation text."""
    tokens = tokenise(tokenizer, documents, None if windows is None else max(windows, 1) * seq_length)
    check_vocabulary(config, tokens)
    return evaluation_windows(tokens, seq_length, windows)


def _drawn(
    tokenizer: Tokenizer,
    config: PretrainedConfig,
    texts: Sequence[Text],
    sequences: str,
    samples: int,
    seq_length: int,
    seeds: Sequence[int],
) -> dict[int, DrawnWindows]:
    """What each seed draws of the calibration texts."""
    draws = WindowSampler(tokenizer, texts, sequences)
    drawn = {seed: draws.draw(samples, seq_length, seed) for seed in seeds}
    for each in drawn.values():
        for tokens in each.batches:
            check_vocabulary(config, tokens.flatten())
    return drawn
