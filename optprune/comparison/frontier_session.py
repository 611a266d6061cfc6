"""Rows of a frontier: each model in each type, measured one at a time, and the speeds of all of them in turn."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.comparison.dense import DensePredictions
from optprune.comparison.frontier import DENSE, FrontierRow, Speed, name_of
from optprune.comparison.frontier_folder import FILES, FrontierFolder
from optprune.errors import InputError
from optprune.export import GgufFile, Importance, ModelSource, export
from optprune.export.gguf_decoded import decode_into
from optprune.export.gguf_types import TYPES
from optprune.measure import Evaluation, SpeedWorkload, bits_per_byte, generate, measure_speed
from optprune.measure.evaluate import negative_log_likelihood, passes, perplexity_from_nll, without_begin
from optprune.measure.llama_cpp import LlamaRequest, measure_in_turn
from optprune.measure.memory import release
from optprune.models import LoadedModel, is_gguf, load_config, load_model, load_tokenizer, need_tokenizer
from optprune.models.checkpoint import weights_files
from optprune.models.sources import file_bytes
from optprune.system.wording import either
from optprune.texts import begin_tokens

LLAMA, TRANSFORMERS = "llama.cpp", "transformers"
AS_STORED = "as stored"
"""the type of rows in transformers"""
DENSE_TYPES = ("f16", "q8_0", "q6_K", "q5_K", "q4_K", "q4_0")
PRUNED_TYPES = ("f16", "q8_0", "q4_K", "q4_0")
PROMPT, CONTINUED = 32, 40
"""tokens of a prompt, and of its continuation"""


@dataclass(frozen=True)
class Wanted:
    """Rows of a frontier."""

    types: tuple[str, ...] = DENSE_TYPES
    """types of the dense model"""
    pruned_types: tuple[str, ...] = PRUNED_TYPES
    runtime: str = LLAMA
    importance: bool = False
    """whether there is a calibration text for the importance of inputs"""

    def __post_init__(self) -> None:
        if self.runtime not in (LLAMA, TRANSFORMERS):
            raise InputError(f"the runtime {self.runtime!r} is unknown: give {either((LLAMA, TRANSFORMERS))}")
        for kind in (*self.types, *self.pruned_types):
            if kind not in TYPES:
                raise InputError(f"the type {kind!r} is unknown: give {', '.join(TYPES)}")
        for types in (self.types, self.pruned_types):
            if len(set(types)) < len(types):
                raise InputError(f"the types {', '.join(types)} repeat one: give each once")

    @classmethod
    def of(
        cls, types: Sequence[str] | None, pruned_types: Sequence[str] | None, runtime: str, *, importance: bool
    ) -> "Wanted":
        """Return the rows for options, of which None takes the usual types."""
        return cls(tuple(types or DENSE_TYPES), tuple(pruned_types or PRUNED_TYPES), runtime, importance)

    def check(self, name: str, folder: str | Path) -> None:
        """Raise InputError where a model cannot be measured in its types, before its weights are read."""
        source = ModelSource(folder)
        if name != DENSE:
            if is_gguf(source.name):
                raise InputError(f"the pruned model {folder} is a GGUF file: give the folder that prune wrote")
            weights_files(source.name, source.name)
        need_tokenizer(source.tokenizer, source.name)
        if self.runtime == LLAMA and not is_gguf(source.name):
            for kind in dict.fromkeys(kind for kind, _ in self.rows(name)):
                refusal = GgufFile(kind=kind).unsupported(source)
                if refusal is not None:
                    raise InputError(refusal)
        assert source.shapes

    def rows(self, model: str) -> Iterator[tuple[str, bool]]:
        """Yield the types of a model, each with whether its rounding is by importance."""
        if self.runtime == TRANSFORMERS:
            yield AS_STORED, False
            return
        for kind in self.types if model == DENSE else self.pruned_types:
            rounds = TYPES[kind].quantised and kind != "q8_0"
            if rounds and self.importance:
                yield kind, True
            # A pruned model has the better of both alone; the dense one has both.
            if model == DENSE or not (rounds and self.importance):
                yield kind, False


@dataclass
class FrontierSession:
    """Rows of a frontier, with the data that they share."""

    place: FrontierFolder
    models: Mapping[str, Path]
    """folders of the dense model and of pruned ones, by name"""
    wanted: Wanted
    windows: Tensor
    """evaluation windows [n, length] of the dense model's tokens"""
    calibration: Callable[[Path], Importance] | None
    work: SpeedWorkload | None
    generations: int
    say: Callable[[str], None]

    def rows(self) -> list[FrontierRow]:
        """Return all rows; finished ones are not measured again."""
        found = list[FrontierRow]()
        for model in self.models:
            wanted = list(self.wanted.rows(model))
            one = _Variant(self, model)
            for kind, by_importance in wanted:
                name = name_of(model, kind, by_importance)
                found.append(self.place.row(name, lambda one=one, kind=kind, by=by_importance: one.measured(kind, by)))
            gc.collect()
            release()
        return found

    def speeds(self, rows: Sequence[FrontierRow]) -> dict[str, Speed]:
        """Return the speeds of all rows, each run in turn with the others."""
        work = self.work
        if work is None:
            return {}
        measure = self._in_llama_cpp if self.wanted.runtime == LLAMA else self._in_transformers
        return self.place.speeds([row.name for row in rows], lambda: measure(rows, work))

    @cached_property
    def predictions(self) -> DensePredictions:
        """The predictions of the dense model, computed once."""
        self.say("evaluating the dense model")
        loaded = load_model(self.models[DENSE], dtype="float32", device="cpu")
        return DensePredictions(loaded.decoder(), self.windows)

    @cached_property
    def tokenizer(self) -> Any:
        """The dense model's tokenizer."""
        return need_tokenizer(load_tokenizer(self.models[DENSE]), str(self.models[DENSE]))

    @cached_property
    def own_tokens(self) -> Tensor:
        """The windows [n, length] without the special tokens that all begin with."""
        return without_begin(self.windows, self.tokenizer)

    @cached_property
    def chunks(self) -> list[str]:
        """The text of each window."""
        return self.tokenizer.batch_decode(self.own_tokens, clean_up_tokenization_spaces=False)

    @property
    def prompts(self) -> list[str]:
        """The beginnings of the first windows."""
        starts = self.own_tokens[: self.generations, :PROMPT]
        return self.tokenizer.batch_decode(starts, clean_up_tokenization_spaces=False)

    def prompt_ids(self, model: str) -> list[Tensor]:
        """Return the prompts as tokens of a model."""
        tokenizer = need_tokenizer(load_tokenizer(self.models[model]), model)
        return [torch.tensor(tokenizer(text)["input_ids"]) for text in self.prompts]

    def file(self, name: str) -> Path:
        """Return the place of a row's file."""
        return self.place.subfolder(FILES) / f"{name}.gguf"

    def _in_llama_cpp(self, rows: Sequence[FrontierRow], work: SpeedWorkload) -> dict[str, Speed]:
        requests = dict[str, LlamaRequest]()
        for row in rows:
            if not self.file(row.name).is_file():
                _Variant(self, row.model).write(row.kind, row.importance)
            vocabulary = load_config(self.models[row.model]).vocab_size
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (work.prompt_tokens,), generator=generator).tolist()
            requests[row.name] = LlamaRequest(
                str(self.file(row.name)), tuple(ids), work.new_tokens, threads=torch.get_num_threads()
            )
        self.say(f"timing {len(rows)} files in turn, {work.repeats} times")
        runs = measure_in_turn(requests, work.repeats)
        return {
            name: Speed(
                tuple(run.prefill for run in each),
                tuple(run.decode for run in each),
                max((run.peak_bytes for run in each if run.peak_bytes is not None), default=None),
            )
            for name, each in runs.items()
        }

    def _in_transformers(self, rows: Sequence[FrontierRow], work: SpeedWorkload) -> dict[str, Speed]:
        self.say(f"timing {len(rows)} models in turn, {work.repeats} times")
        loaded = {row.name: load_model(self.models[row.model], device="cpu").model for row in rows}
        return {
            one.name: Speed(one.prefill.values, one.decode.values, one.peak_bytes)
            for one in measure_speed(loaded, work)
        }


class _Variant:
    """A model folder of a frontier, with what its rows share."""

    def __init__(self, session: FrontierSession, model: str) -> None:
        self.session, self.model, self.folder = session, model, session.models[model]

    @cached_property
    def source(self) -> ModelSource:
        return ModelSource(self.folder)

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.folder, dtype="float32", device="cpu")

    @cached_property
    def importance(self) -> Importance:
        assert self.session.calibration is not None
        self.session.say(f"measuring the inputs of the layers of {self.model}")
        return self.session.calibration(self.folder)

    def exporter(self, kind: str, by_importance: bool) -> GgufFile:
        return GgufFile(kind=kind, importance=self.importance if by_importance else None)

    def write(self, kind: str, by_importance: bool) -> tuple[int, tuple[str, ...]]:
        """Write the file of a row; return its size and the notes of the export."""
        file = self.session.file(name_of(self.model, kind, by_importance))
        done = export(self.folder, file, self.exporter(kind, by_importance), overwrite=True)
        return done.bytes, done.notes

    def measured(self, kind: str, by_importance: bool) -> FrontierRow:
        """Return a row with its quality."""
        session = self.session
        if kind == AS_STORED:
            size, notes = file_bytes(str(self.folder)), ()
        else:
            size, notes = self.write(kind, by_importance)
            file = session.file(name_of(self.model, kind, by_importance))
            decode_into(self.loaded.model, file, self.source, self.exporter(kind, by_importance))
        found = self._quality()
        self.loaded.decoder().joined()
        texts = generate(self.loaded.model, self._tokenizer, session.prompt_ids(self.model), new_tokens=CONTINUED)
        row = FrontierRow(self.model, kind, by_importance, size, *found, notes, tuple(texts))
        if session.work is None and kind != AS_STORED:
            session.file(row.name).unlink()
        session.say(f"{row}: {size / 2**20:.1f} MiB, {row.bits_per_byte:.4f} bits per byte")
        return row

    @cached_property
    def _tokenizer(self) -> Any:
        return need_tokenizer(self.loaded.tokenizer, self.model)

    def _quality(self) -> tuple[float, float, float | None, float | None]:
        """Return bits per byte, the perplexity, and the divergence from the dense model with the agreement."""
        session, windows = self.session, self.session.windows
        if self._tokenizer.get_vocab() == session.tokenizer.get_vocab():
            found = session.predictions.divergence_to(self.loaded.decoder())
            evaluation = Evaluation(found.perplexity, windows.numel() - len(windows), len(windows), 0.0)
            bits = bits_per_byte(evaluation, windows, session.tokenizer)
            return bits, found.perplexity, found.divergence, found.agreement
        return *self._by_own_tokens(), None, None

    @torch.no_grad()
    def _by_own_tokens(self) -> tuple[float, float]:
        """Return bits per byte and the perplexity on the texts of the windows in the model's own tokens."""
        total, predictions, tokens = 0.0, 0, 0
        model = self.loaded.model
        begun = self.session.own_tokens.shape != self.session.windows.shape
        begin = begin_tokens(self._tokenizer) if begun else []
        for text in self.session.chunks:
            own = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([*begin, *own])[None]
            for one, logits in passes(model, ids):
                total = negative_log_likelihood(one, logits, total)
            predictions, tokens = predictions + ids.numel() - 1, tokens + len(own)
        size = sum(len(text.encode()) for text in self.session.chunks)
        perplexity = perplexity_from_nll(total, predictions)
        return total / predictions / math.log(2) * tokens / max(size, 1), perplexity
