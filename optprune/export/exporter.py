"""Interface of exporters, and `export`, which runs one so that its output appears whole or not at all."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError, OptpruneError, is_out_of_memory, no_room_behind
from optprune.export.place import (
    Scratch,
    check_apart,
    check_output,
    check_output_file,
    delete_left_behind,
    former_notes,
    missing_parents,
    put_in_place,
    record_written,
    set_aside,
)
from optprune.export.source_files import check_own_files
from optprune.measure.memory import free_memory
from optprune.models import Decoder, LoadedModel, load_config, load_model, load_shapes, load_tokenizer, vision_folder
from optprune.models.vision import VisionFolder
from optprune.report import Event, PhaseRecorder, PhaseReport
from optprune.report.phases import CHECKING, SAVING
from optprune.system.files import flush_all, real_path
from optprune.system.interrupts import interrupts_held, record_done
from optprune.system.wording import amount
from optprune.work import Work

MARGIN = 1.25
"""an export is refused above this multiple of the free memory: what exporters declare of their memory is an estimate"""

OnEvent = Callable[[Event], None]


class ModelSource:
    """Model to export: a loaded one, or a folder (also a .gguf file or a hub name) that is read only when needed."""

    def __init__(self, model: str | Path | LoadedModel) -> None:
        self.loaded = model if isinstance(model, LoadedModel) else None
        self.name = model.source if isinstance(model, LoadedModel) else str(model)
        """the folder, file or hub name; of a model in memory the one that it was loaded from, or an empty string"""

    @property
    def device(self) -> torch.device:
        """The device of the loaded model; the CPU for a folder."""
        return torch.device("cpu") if self.loaded is None else self.loaded.model.device

    @cached_property
    def whole(self) -> VisionFolder | None:
        """The vision-language model that the model is the language part of, if it is one."""
        return self.loaded.whole if self.loaded is not None else vision_folder(self.name)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of the model."""
        return load_config(self.name) if self.loaded is None else self.loaded.model.config

    @cached_property
    def shapes(self) -> Decoder:
        """The model without its weights, on the meta device, if it is not loaded."""
        return load_shapes(self.name, self.config) if self.loaded is None else self.loaded.decoder()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where the model has none."""
        return load_tokenizer(self.name) if self.loaded is None else self.loaded.tokenizer

    def load(self, dtype: str = "auto") -> LoadedModel:
        """Return the whole model in memory: the loaded one as it is, or the folder's on the CPU in a dtype."""
        return self.loaded or load_model(self.name, dtype=dtype, device="cpu")


@dataclass(frozen=True)
class Draft:
    """Output of `Exporter.write`, before it is checked and gets its name."""

    path: Path
    """the file or the folder"""
    bytes: int
    """size of the file, or of the weights in the folder"""
    summary: str = ""
    """description for the user in a few words, such as "architecture llama" """
    notes: tuple[str, ...] = ()
    """sentences that the user should read"""
    expected: Any = None
    """value that `Exporter.check` compares the draft with, such as logits"""


@dataclass(frozen=True)
class Exported:
    """Result of `export`."""

    path: Path
    """the file or the folder"""
    bytes: int
    """size of the file, or of the weights in the folder"""
    summary: str
    notes: tuple[str, ...]
    logits_difference: float | None
    """largest difference between the logits of the original and of the output; None where logits were not compared"""
    phases: tuple[PhaseReport, ...]
    """duration and peak memory of writing and checking"""


class Exporter(ABC):
    """Writer of models in one format. To add a format, subclass it and pass an instance to `export`.

    An instance holds the options of the format. `export` finds the output path, calls `unsupported`, `write` and
    `check`, and gives the draft its name when all of them have succeeded.
    """

    name: ClassVar[str]
    """name of the format, as in `optprune export --format`"""
    description: ClassVar[str]
    """runtimes that read the format, in a few words"""
    is_folder: ClassVar[bool] = True
    """whether the output is a folder; otherwise it is a file"""
    magic: ClassVar[bytes] = b""
    """bytes that all files of the format begin with: a file with another beginning is not overwritten"""
    noun: ClassVar[str] = "exported model"
    """name of the output in messages"""
    keeps_unchecked: ClassVar[bool] = False
    """whether a draft that fails its check is kept, as NAME.unchecked beside the output; otherwise it is deleted"""
    takes_parts: ClassVar[bool] = False
    """whether the output holds the vision part too, where the model is part of a vision-language model"""
    checks: bool = True
    """whether `check` is called"""

    @abstractmethod
    def unsupported(self, source: ModelSource) -> str | None:
        """Return a sentence that says why the model cannot be exported, or None. Do not read weights."""

    @abstractmethod
    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        """Write the model to the path `draft`, where nothing is yet. Its parent is a scratch folder."""

    @abstractmethod
    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        """Read the draft back and raise OptpruneError where it is not the model.

        Return the largest difference of logits, or None where logits are not compared.
        """

    @abstractmethod
    def work(self, source: ModelSource) -> Work:
        """Return the work of writing and checking."""

    def check_output(self, output: Path, overwrite: bool) -> None:
        """Raise InputError where the output could not be written."""
        if self.is_folder:
            check_output(output, overwrite)
        else:
            check_output_file(output, overwrite, self.magic)

    def record_phases(self, draft: Draft, phases: tuple[PhaseReport, ...]) -> None:  # noqa: B027  # optional
        """Store durations in the draft; called after writing, and again after checking."""


def export(
    model: str | Path | LoadedModel,
    output: str | Path,
    exporter: Exporter,
    *,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Exported:
    """Write a model in the format of an exporter, check it, and give it its name: whole or not at all.

    The model is a folder, another source of `load_model`, or a loaded model. Exporters are `TransformersFolder`,
    `GgufFile` and `OnnxFolder`, or any subclass of `Exporter`; for example `export("pruned", "p.gguf", GgufFile())`.
    Raises InputError where the exporter refuses the model or the output cannot be written, and OptpruneError where the
    check fails.
    """
    source, output = ModelSource(model), Path(output)
    place = real_path(output)  # a link stays a link to the new output
    _check(source, output, exporter, overwrite)
    delete_left_behind(place)
    created, scratch, written, checked = missing_parents(place), None, False, False
    phases, difference = PhaseRecorder(source.device, on_event), None
    try:
        with phases.phase(SAVING):
            with interrupts_held():
                place.parent.mkdir(parents=True, exist_ok=True)
                scratch = Scratch(place)
            draft = exporter.write(source, scratch.folder / "model", on_event)
            flush_all(draft.path)  # here it can be interrupted, and `put_in_place` has little left to flush
        exporter.record_phases(draft, phases.done)
        if exporter.checks:
            written = True
            with phases.phase(CHECKING):
                difference = exporter.check(source, draft, on_event)
            checked = True
            exporter.record_phases(draft, phases.done)
        record_written(draft.path)
        with interrupts_held():
            put_in_place(draft.path, place, overwrite, exporter.magic)
            record_done(f"the {exporter.noun} is in {output}")
            scratch.discard()
            return Exported(
                output, draft.bytes, draft.summary, (*draft.notes, *former_notes(place)), difference, phases.done
            )
    except BaseException as error:
        unchecked = None
        with interrupts_held():
            kept = exporter.keeps_unchecked and written and not (checked and no_room_behind(error))
            if scratch is not None and kept and isinstance(error, Exception):
                unchecked = set_aside(scratch.folder / "model", place)
            if scratch is not None:
                scratch.discard()
            for parent in () if place.exists() or unchecked is not None else created:
                with contextlib.suppress(OSError):  # not there yet, or somebody else has put something into it
                    parent.rmdir()
        described = _described(error, exporter.noun, output, unchecked, scratch, checked=checked)
        if described is error:
            raise
        raise described from error


def _check(source: ModelSource, output: Path, exporter: Exporter, overwrite: bool) -> None:
    """Raise InputError where the output cannot be written, or the exporter refuses the model or lacks memory."""
    check_apart(output, [source.name])
    exporter.check_output(output, overwrite)
    if source.name:
        check_own_files(source.name)
    if source.whole is not None and not exporter.takes_parts:
        raise source.whole.refused(f"the {exporter.noun} cannot hold its vision part")
    refusal = exporter.unsupported(source)
    if refusal is not None:
        raise InputError(refusal)
    if source.loaded is None:
        needed, free = round(exporter.work(source).bytes), free_memory()
        if free is not None and needed > MARGIN * free:
            raise InputError(
                f"writing the {exporter.noun} takes {amount(needed)} of memory, and {amount(free)} are free: "
                "close other programs, or use a machine with more memory"
            )


def _described(
    error: BaseException, noun: str, output: Path, unchecked: Path | None, scratch: Scratch | None, *, checked: bool
) -> BaseException:
    """Return the error to raise, which names the files that were written and those that could not be deleted."""
    full = no_room_behind(error)
    if full is not None and unchecked is None:
        return InputError(f"{full}, so {output} was not written: make room and run again")
    if unchecked is not None and is_out_of_memory(error):
        return OptpruneError(f"the memory is not enough to check the {noun}, which is in {unchecked}")
    if not isinstance(error, OptpruneError):
        return error
    sentence = str(error)
    if unchecked is not None and checked:
        sentence += f"; the {noun} is in {unchecked}"
    elif unchecked is not None:
        sentence = f"the {noun} is in {unchecked}, but its check failed: {sentence}"
    if scratch is not None and scratch.folder.exists():
        sentence += f"; {scratch.folder} could not be deleted: do that by hand"
    return error if sentence == str(error) else OptpruneError(sentence)
