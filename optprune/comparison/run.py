"""Comparison of recipes: each at every sparsity, on the same statistics, texts and evaluator."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.calibration.generated import check_count, check_held_out
from optprune.calibration.statistics_cache import digest_of_weights
from optprune.comparison.dense import dense_source
from optprune.comparison.grid import Grid
from optprune.comparison.kept_folder import ComparisonFolder
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
from optprune.system.folders import check_manifest_folder, kept_or_discarded
from optprune.system.wording import install, shown
from optprune.texts import (
    Document,
    DrawnWindows,
    Text,
    WindowSampler,
    begin_of,
    check_seq_length,
    check_sequences,
    check_vocabulary,
    evaluation_windows,
    normalised_text,
    read_documents,
    read_texts,
    tokenise,
)

NO_PICTURE = f"the page has no picture, which needs matplotlib: {install('plot')}"


@dataclass(frozen=True)
class TextOptions:
    """Options on the texts of a comparison, which are among its facts."""

    calibration: str
    text: str
    sequences: str
    samples: int
    seq_length: int
    generated: int

    def check(self, grid: Grid) -> None:
        """Raise InputError unless the options go together, whatever the texts are."""
        check_sequences(self.sequences)
        check_count(self.generated)
        check_held_out(self.samples, self.generated, grid.held_out)

    def facts(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return {
            "the calibration text": self.calibration,
            "the evaluation text": self.text,
            "the sequences": self.sequences,
            "the samples": self.samples,
            "the length of a window": self.seq_length,
            "the number of generated windows": self.generated,
        }

    def drawn(
        self, tokenizer: Tokenizer, config: PretrainedConfig, texts: Sequence[Text], seeds: Sequence[int]
    ) -> dict[int, DrawnWindows]:
        """Return the calibration windows of each seed."""
        draws = WindowSampler(tokenizer, texts, self.sequences)
        drawn = {seed: draws.draw(self.samples, self.seq_length, seed) for seed in seeds}
        for each in drawn.values():
            for tokens in each.batches:
                check_vocabulary(config, tokens.flatten())
        return drawn


def compare(
    model: str | Path | LoadedModel,
    recipes: Sequence[str | Recipe],
    sparsities: Sequence[float],
    *,
    calibration: str,
    text: str,
    samples: int = 128,
    seq_length: int = 2048,
    generated: int = 0,
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
    """Prune a model by each recipe at each sparsity, and return a table of quality, size and time.

    The model is a source of `load_model`, or a loaded one, which is not changed. A recipe is a name, a YAML file or a
    `Recipe`; `settings` are recipe fields for all of them. `calibration` is one text or several with shares, as for
    `read_texts`, and `text` is as for `read_documents`; they must have no document in common. Each seed draws `samples`
    windows of `seq_length` tokens, by `sequences` as `draw_windows` does; a number of `seeds` means 0, 1, and so on.
    The dense model generates `generated` further windows for each seed, which all recipes calibrate on too. Each model
    is evaluated on the first `windows` windows of the text, or all, and compared with the dense model. Cells of a seed
    share the statistics of the dense model (see `collect`). A cell that fails has its sentence in the table.

    With a `folder`, finished cells are stored, a second call with the same options resumes, and the table is written
    there as comparison.md, comparison.json and comparison.html, with a picture by matplotlib. `keep_models` saves the
    models there in models/. Speed is measured only with a `SpeedWorkload`. `architecture` is as in `load_model`. `say`
    is called with sentences about finished steps, `on_event` with the events of each run.
    """
    grid = Grid.of(recipes, sparsities, seeds, settings)
    data = TextOptions(calibration, text, sequences, samples, seq_length, generated)
    check_dtype(dtype)
    device_of(device)
    if keep_models and folder is None:
        raise InputError("models are kept in the folder of the comparison: name a folder")
    data.check(grid)
    if folder is not None:
        check_manifest_folder(real_path(Path(folder)), ComparisonFolder.noun)
    texts, documents = texts_apart(calibration, text)
    source = dense_source(model, dtype, device, architecture)
    config, tokenizer = source.config(), source.tokenizer()
    check_seq_length(config, seq_length)
    if speed is not None:
        speed.check(source.source, config)
    say(f"tokenising {calibration} and {text}")
    with using_tokenizer(source.source):
        # A text that is too short is refused before anything is loaded.
        drawn = data.drawn(tokenizer, config, texts, grid.seeds)
        held = windows_to_evaluate(tokenizer, config, documents, seq_length, windows, sequences)
    with ExitStack() as contexts:
        named = folder or contexts.enter_context(tempfile.TemporaryDirectory(prefix="optprune-"))
        place = contexts.enter_context(kept_or_discarded(ComparisonFolder(named), stays=folder is not None))
        say(f"loading {source.source}")
        dense = source.to_measure(place.work, whole=speed is not None)
        options = {
            "the model": source.source,
            "the weights": digest_of_weights(dense.decoder()),
            "the dtype": str(dense.model.dtype),
            **data.facts(),
            "the windows evaluated": len(held),
            "the architecture": fingerprint(str(draft_in(config))),
            **grid.facts(),
            "the tokens": fingerprint([held, *(batch for each in drawn.values() for batch in each.batches)]),
            "whether speed is measured": speed is not None,
            "whether models are kept": keep_models,
            "the version": versions(),
            "the machine": machine(dense.model.device),
        }
        place.begin(options)
        session = Session(grid, source, place, drawn, generated, held, keep_models, speed, say, on_event, dense)
        comparison = Comparison(source.source, session.dense(), session.measure(), options)
        place.conclude(comparison)
    return comparison


def windows_to_evaluate(
    tokenizer: Tokenizer,
    config: PretrainedConfig,
    documents: list[Document],
    seq_length: int,
    windows: int | None,
    sequences: str,
) -> Tensor:
    """Return the first windows [n, seq_length] of the evaluation text, or all; only as many documents are tokenised.

    They begin as packed windows of the calibration do: see `begin_of`.
    """
    tokens = tokenise(tokenizer, documents, None if windows is None else max(windows, 1) * seq_length)
    check_vocabulary(config, tokens)
    return evaluation_windows(tokens, seq_length, windows, begin_of(tokenizer, sequences))


def texts_apart(calibration: str, text: str) -> tuple[list[Text], list[Document]]:
    """Return the texts to calibrate on and the documents to evaluate on.

    Raises InputError where they have a document in common.
    """
    fitted, held = read_texts(calibration), read_documents(text)
    common = {normalised_text(document) for one in fitted for document in one.documents} & set(
        map(normalised_text, held)
    )
    if common:
        first = shown(min(common)[:60])
        raise InputError(
            f"the evaluation text {text} shares {len(common)} of its {len(held)} documents with the calibration text "
            f"{calibration}, such as {first}: evaluate on a text without them"
        )
    return fitted, held
