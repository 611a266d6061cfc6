"""Frontier of a model: the call, its options, and the folder that it resumes from."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.calibration.statistics_cache import digest_of_weights
from optprune.comparison.frontier import DENSE, Frontier, with_speeds
from optprune.comparison.frontier_folder import MODELS, PRUNED, FrontierFolder
from optprune.comparison.frontier_session import LLAMA, FrontierSession, Wanted
from optprune.comparison.grid import Grid
from optprune.comparison.run import TextOptions, compare, texts_apart, windows_to_evaluate
from optprune.errors import InputError, check_at_least
from optprune.export import Importance, importance_of, save_model
from optprune.measure import SpeedWorkload
from optprune.measure.llama_cpp_binding import binding
from optprune.models import (
    LoadedModel,
    is_gguf,
    load_config,
    load_model,
    load_tokenizer,
    need_tokenizer,
    using_tokenizer,
    vision_folder,
)
from optprune.models.sources import DEMO, DEMO_NAME
from optprune.report import Event
from optprune.system.environment import machine, versions
from optprune.system.files import real_path
from optprune.system.folders import check_manifest_folder, kept_or_discarded
from optprune.texts import check_seq_length, read_documents

BY_DECODING = (
    "the weights of each file, decoded exactly, in transformers in float32; llama.cpp also rounds the inputs of "
    "products to 8 bits, which is in no row"
)
AS_THEY_ARE = "the weights of each folder in transformers in float32"


@dataclass(frozen=True, kw_only=True)
class FrontierRequest:
    """Options of a frontier, checked before anything is loaded."""

    model: str
    text: str
    against: tuple[str, ...]
    recipes: tuple[str, ...]
    sparsities: tuple[float, ...]
    calibration: str | None
    wanted: Wanted
    samples: int
    seq_length: int
    sequences: str
    windows: int | None
    settings: Mapping[str, Any]
    speed: SpeedWorkload | None
    generations: int

    def check(self) -> None:
        """Raise InputError where the options do not fit together."""
        if self.wanted.runtime == LLAMA:
            binding()
        check_at_least("samples", self.samples, 1)
        check_at_least("generations", self.generations, 0)
        if bool(self.recipes) != bool(self.sparsities) or (self.recipes and self.calibration is None):
            raise InputError("recipes need sparsities and a calibration text: give all three, or none")
        if self.settings and not self.recipes:
            names = ", ".join(self.settings)
            raise InputError(f"{names} cannot be set without recipes to prune by: name some, or leave it out")
        names = [*self.folders(), DENSE]
        if len(set(names)) < len(self.against) + 1:
            raise InputError(f"the pruned folders are called {', '.join(names[:-1])}: give folders of different names")
        config, whole = load_config(self.model), vision_folder(self.model)
        if whole is not None:
            raise whole.refused("the rows of frontier are files for llama.cpp, which hold no vision part")
        check_seq_length(config, self.seq_length)
        if self.speed is not None:
            self.speed.check(self.model, config)
        if self.recipes:
            self.data.check(Grid.of(self.recipes, self.sparsities, 1, self.settings))
        self.wanted.check(DENSE, self.model)
        for name, folder in self.folders().items():
            self.wanted.check(name, folder)

    @property
    def data(self) -> TextOptions:
        """The texts, as a comparison of the recipes has them."""
        return TextOptions(str(self.calibration), self.text, self.sequences, self.samples, self.seq_length, 0)

    def folders(self) -> dict[str, Path]:
        """Return the folders of pruned models by their names in the table."""
        return {Path(name).resolve().name: Path(name) for name in self.against}

    def held(self) -> Tensor:
        """Return the evaluation windows [n, length]; InputError where a text is too short for what is asked."""
        tokenizer, config = need_tokenizer(load_tokenizer(self.model), self.model), load_config(self.model)
        with using_tokenizer(self.model):
            if self.calibration is None:
                documents = read_documents(self.text)
            else:
                fitted, documents = texts_apart(self.calibration, self.text)
                self.data.drawn(tokenizer, config, fitted, [0])
            return windows_to_evaluate(tokenizer, config, documents, self.seq_length, self.windows, self.sequences)

    def facts(self, dense: LoadedModel, held: Tensor) -> dict[str, Any]:
        """Return the options that determine all results."""
        decoding = self.wanted.runtime == LLAMA
        return {
            "the model": self.model,
            "the weights": digest_of_weights(dense.decoder()),
            "the evaluation text": self.text,
            "the windows evaluated": len(held),
            "the length of a window": self.seq_length,
            "the calibration text": self.calibration,
            "the samples": None if self.calibration is None else self.samples,
            "the sequences": self.sequences,
            "the recipes": list(self.recipes),
            "the sparsities": list(self.sparsities),
            "the settings": dict(self.settings),
            "the pruned folders": list(self.against),
            "the types": [list(self.wanted.types), list(self.wanted.pruned_types)],
            "the runtime": self.wanted.runtime,
            "how quality is measured": BY_DECODING if decoding else AS_THEY_ARE,
            "how speed is measured": "" if self.speed is None else self._speed_in_words(self.speed),
            "the version": versions(),
            "the machine": machine(torch.device("cpu")),
        }

    def _speed_in_words(self, work: SpeedWorkload) -> str:
        threads = torch.get_num_threads()
        return (
            f"{self.wanted.runtime} on the CPU, {threads} thread{'s' * (threads > 1)}, prompts of {work.prompt_tokens} "
            f"tokens, {work.new_tokens} new ones, medians of {work.repeats} repeats in which all rows take turns; "
            "memory is the growth of the process from before the model is loaded to its peak"
        )

    def importance(self, folder: Path) -> Importance:
        """Return the importance of the inputs of a model, measured on the calibration text."""
        text, sequences = str(self.calibration), self.sequences
        return importance_of(folder, text, samples=self.samples, seq_length=self.seq_length, sequences=sequences)

    def pruned(
        self, place: FrontierFolder, say: Callable[[str], None], on_event: Callable[[Event], None]
    ) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Prune by every recipe at every sparsity; return the folders by name, and a sentence for each failure."""
        if not self.recipes:
            return {}, ()
        folder = place.subfolder(PRUNED)
        found = compare(
            self.model,
            self.recipes,
            self.sparsities,
            calibration=str(self.calibration),
            text=self.text,
            samples=self.samples,
            seq_length=self.seq_length,
            sequences=self.sequences,
            windows=self.windows,
            settings=self.settings,
            folder=folder,
            keep_models=True,
            say=say,
            on_event=on_event,
        )
        cells = [result.cell for result in found.results if result.figures is not None]
        return {f"{cell.recipe}-{cell.sparsity:g}": folder / "models" / cell.name for cell in cells}, found.failures


def frontier(
    model: str | Path,
    *,
    text: str,
    folder: str | Path,
    against: Sequence[str | Path] = (),
    recipes: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    calibration: str | None = None,
    types: Sequence[str] | None = None,
    pruned_types: Sequence[str] | None = None,
    runtime: str = LLAMA,
    samples: int = 128,
    seq_length: int = 2048,
    sequences: str = "packed",
    windows: int | None = None,
    settings: Mapping[str, Any] | None = None,
    speed: SpeedWorkload | None = None,
    generations: int = 3,
    say: Callable[[str], None] = lambda text: None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Frontier:
    """Measure a dense model in fewer bits, pruned models, and both together; return the rows with a verdict.

    `against` are folders of pruned models. `recipes` at `sparsities` are pruned here, by `compare`, on the
    `calibration` text, which is also that of the importance of inputs. All are measured on the first `windows` windows
    of `text`. With the runtime "llama.cpp" each model is a GGUF file in each of its types; with "transformers" it is a
    folder as stored. With `speed` all rows are timed in turn. Finished rows are kept in `folder`, and a second call
    with the same options resumes. Raises InputError where the options do not fit together.
    """
    wanted = Wanted.of(types, pruned_types, runtime, importance=calibration is not None)
    request = FrontierRequest(
        model=str(model),
        text=text,
        against=tuple(map(str, against)),
        recipes=tuple(recipes),
        sparsities=tuple(sparsities),
        calibration=calibration,
        wanted=wanted,
        samples=samples,
        seq_length=seq_length,
        sequences=sequences,
        windows=windows,
        settings=dict(settings or {}),
        speed=speed,
        generations=generations,
    )
    request.check()
    check_manifest_folder(real_path(Path(folder)), FrontierFolder.noun)
    held = request.held()
    with ExitStack() as contexts:
        place = contexts.enter_context(kept_or_discarded(FrontierFolder(folder)))
        say(f"loading {model}")
        dense = load_model(str(model), dtype="float32", device="cpu")
        options = request.facts(dense, held)
        place.begin(options)
        models = {DENSE: _dense_folder(request.model, dense, place)}
        del dense
        pruned, failures = request.pruned(place, say, on_event)
        models |= {**pruned, **request.folders()}
        calibrate = request.importance if calibration is not None else None
        session = FrontierSession(place, models, wanted, held, calibrate, speed, generations, say)
        rows = tuple(session.rows())
        rows = with_speeds(rows, session.speeds(rows))
        name = DEMO_NAME if str(model) == DEMO else Path(str(model)).name
        found = Frontier(name, rows, options, tuple(session.prompts), failures)
        place.conclude(found)
    return found


def _dense_folder(model: str, dense: LoadedModel, place: FrontierFolder) -> Path:
    """Return a folder with the weights of the dense model: its own, or one that is written from another source."""
    if Path(model).is_dir() and not is_gguf(model):
        return Path(model)
    folder = place.subfolder(MODELS) / DENSE
    if not folder.exists():
        save_model(dense, folder)
    return folder
