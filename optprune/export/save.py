"""Saving: a folder appears whole or not at all, and under its name once a fresh process has loaded it and agreed."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError, OptpruneError, no_room_behind
from optprune.export.check import compare, logits_of
from optprune.export.place import Scratch, check_output, missing_parents, put_in_place, set_aside
from optprune.export.portable import make_portable
from optprune.export.progress import Progress
from optprune.export.report_files import ReportFiles
from optprune.export.shards import MAX_SHARD_SIZE, size_of, write_weights
from optprune.measure.speed import file_bytes
from optprune.models import Decoder, is_stock
from optprune.models.store import BlockStore
from optprune.report import Event, PhaseRecorder, Report
from optprune.report.phases import CHECKING, SAVING
from optprune.system.files import real_path
from optprune.system.interrupts import interrupts_held, record_done


@dataclass(frozen=True)
class SavedModel:
    """What was written, and how the reloaded model compared."""

    folder: Path
    bytes: int
    """the size of the weights"""
    stock: bool
    """whether plain transformers loads the folder; otherwise it needs trust_remote_code=True, or optprune.load_model"""
    logits_difference: float | None
    """the largest difference between the logits in memory and those of the reloaded model; None when not checked"""
    report: Report | None = None
    """the report as it is in the folder, with what saving and checking took"""


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    check_tokens: Tensor | None = None,
    overwrite: bool = False,
    store: BlockStore | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    made: Sequence[Path] = (),
    report: Report | None = None,
    finish: Callable[[Path], None] = lambda draft: None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> SavedModel:
    """Write a model folder with safetensors weights, the tokenizer and extra text files, whole or not at all.

    With `check_tokens` [batch, tokens], token ids, a fresh Python process loads the folder without optprune, a block at
    a time, with the modelling file in the folder where the shapes are not stock, and its logits on them must agree with
    those in memory. Where they do not, or the process fails, the folder stays under a name that ends with ".unchecked".
    A model that `open_model` gave comes with the `store` of its blocks. Where the weights are more than
    `max_shard_size`, files `made` that hold a block each are linked and not copied. A `report` is written as
    report.json, and as a page, report.html, with what saving took and, once the folder is checked, checking. What
    `finish` adds to a folder is there when it gets its name.
    """
    folder, decoder, most = Path(folder), Decoder(model, store), size_of(max_shard_size)
    check_output(folder, overwrite, files or ())
    place = real_path(folder)  # a link stays a link to the new folder
    created, scratch, draft, written, difference = missing_parents(place), None, None, False, None
    phases, progress = PhaseRecorder(model.device, on_event), Progress(on_event, check_tokens is not None)
    try:
        with phases.phase(SAVING):
            logits = None if check_tokens is None else logits_of(decoder, check_tokens, progress.computed)
            with interrupts_held():
                place.parent.mkdir(parents=True, exist_ok=True)
                scratch = Scratch(place)
            draft = _write(decoder, scratch.folder / "model", tokenizer, files or {}, most, made, progress.written)
        reports = None if report is None else ReportFiles.of(report, decoder, draft, tokenizer=tokenizer is not None)
        told = reports and reports.put(draft, phases.done)
        if check_tokens is not None and logits is not None:
            written = True
            with phases.phase(CHECKING):
                progress.process_starts()
                difference = compare(decoder, draft, check_tokens, logits, scratch.folder, progress.checked)
            told = reports and reports.put(draft, phases.done)
        finish(draft)
        with interrupts_held():
            put_in_place(draft, place, overwrite)
            record_done(f"the pruned model is in {folder}")
            scratch.discard()
            return SavedModel(folder, file_bytes(str(place)), is_stock(decoder.joined().config), difference, told)
    except BaseException as error:
        unchecked = None
        with interrupts_held():
            if written and draft is not None and isinstance(error, Exception):
                unchecked = set_aside(draft, place)
            if scratch is not None:
                scratch.discard()
            for parent in () if place.exists() or unchecked is not None else created:
                with contextlib.suppress(OSError):  # not there yet, or somebody else has put something into it
                    parent.rmdir()
        described = _described(error, folder, unchecked, scratch, checked=difference is not None)
        if described is error:
            raise
        raise described from error


def _described(
    error: BaseException, folder: Path, unchecked: Path | None, scratch: Scratch | None, *, checked: bool
) -> BaseException:
    """Return an error as the user is to see it: what is not there, what is, and what could not be taken away."""
    full = no_room_behind(error)
    if full is not None and unchecked is None:
        return InputError(f"{full}, so {folder} was not written: make room and run again")
    if not isinstance(error, OptpruneError):
        return error
    sentence = str(error)
    if unchecked is not None and checked:
        sentence += f"; the pruned model is in {unchecked}"
    elif unchecked is not None:
        sentence = f"the pruned model is in {unchecked}, but it was not seen to load: {sentence}"
    if scratch is not None and scratch.folder.exists():
        sentence += f"; of it {scratch.folder} could not be deleted: do that by hand"
    return error if sentence == str(error) else OptpruneError(sentence)


def cast(model: PreTrainedModel, dtype: torch.dtype, store: BlockStore | None = None) -> None:
    """Round a model's weights to another dtype, in place; InputError when it has not the range for them.

    What is not stored (the angles of rotary embeddings) stays as it is, as when a folder in that dtype is loaded. Of a
    model whose blocks come from a `store`, every block is read once to see that it can be rounded.
    """
    decoder, names = Decoder(model, store), {parameter: name for name, parameter in model.named_parameters()}
    rounded = {parameter: _rounded(name, parameter, dtype) for parameter, name in names.items()}
    for index in range(0 if store is None else len(decoder.blocks)):
        with decoder.resident(index) as block:
            for name, parameter in block.named_parameters():
                _rounded(decoder.name(index, name), parameter, dtype)
    for parameter, value in rounded.items():
        parameter.data = value
    decoder.joined()
    if store is not None:
        store.dtype = dtype


def _rounded(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    value = parameter.detach().to(dtype)
    if not value.is_meta and not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds values beyond {dtype}: save in bfloat16 or float32")
    return value


def _write(
    decoder: Decoder,
    draft: Path,
    tokenizer: Tokenizer | None,
    files: Mapping[str, str],
    most: int,
    made: Sequence[Path],
    on_tensor: Callable[[int, int], None],
) -> Path:
    decoder.model.save_pretrained(draft, state_dict={})  # all but the weights, which it would want in memory
    write_weights(decoder, draft, most, made, on_tensor)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    make_portable(draft, tokenizer)
    for name, text in files.items():
        (draft / name).write_text(text, encoding="utf-8")
    usual = draft.stat().st_mode & 0o666
    for file in draft.rglob("*"):
        # Some files are made private, which a folder that is shared should not have by surprise.
        if file.is_file():
            file.chmod(usual)
    return draft
