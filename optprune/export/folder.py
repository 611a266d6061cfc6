"""Exporter of model folders for transformers, and `save_model`, which adds the report, the recipe and the card."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from optprune.errors import InputError
from optprune.export.around import check_around, write_around
from optprune.export.card import ModelCard, healed_card, plain
from optprune.export.check import compare, logits_of
from optprune.export.exporter import Draft, Exporter, ModelSource, OnEvent, export
from optprune.export.place import check_apart
from optprune.export.portable import make_portable
from optprune.export.shards import MAX_SHARD_SIZE, size_of, write_weights
from optprune.export.source_files import CARD, origin_of, own_text
from optprune.models import DTYPES, Decoder, LoadedModel, check_dtype, is_stock, open_model
from optprune.models.sources import file_bytes
from optprune.models.store import BlockStore
from optprune.models.vision import stand_alone
from optprune.numerics.tensors import all_finite, rounded
from optprune.recipe import Recipe
from optprune.report import (
    Event,
    ModelSummary,
    PhaseAdvanced,
    PhaseReport,
    Report,
    joined,
    page,
    pictures,
    read_healing,
    summarise_model,
)
from optprune.report.phases import CHECKING, SAVING
from optprune.report.reading import PAGE, REPORT, read_run_report
from optprune.system.files import json_text, write_whole
from optprune.system.wording import shown
from optprune.work import Work

CHECK_TOKENS = 128
"""maximum number of tokens of a sequence that the logits are compared on"""
RECIPE = "recipe.yaml"
COMPUTED = 0.3
"""share of the saving that computing the logits takes, roughly"""
STARTED, COMPARED = 0.7, 0.8
"""shares of the checking after which, roughly, a process has loaded the folder, and has run all blocks"""


@dataclass(frozen=True)
class SavedModel:
    """Result of `save_model`."""

    folder: Path
    bytes: int
    """size of the weights"""
    stock: bool
    """whether plain transformers loads the folder; otherwise it needs trust_remote_code=True, or optprune.load_model"""
    logits_difference: float | None
    """largest difference between the logits in memory and those of the reloaded model; None when not checked"""
    report: Report | None = None
    """the report as it is in the folder, with the durations of saving and checking"""


def save_model(
    model: PreTrainedModel | LoadedModel,
    folder: str | Path,
    *,
    report: Report | None = None,
    recipe: Recipe | None = None,
    healing: Mapping[str, Any] | None = None,
    teacher: str = "",
    check_tokens: Tensor | None = None,
    overwrite: bool = False,
    dtype: str = "auto",
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    made: Sequence[Path] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> SavedModel:
    """Write a model folder with safetensors weights and the tokenizer, whole or not at all.

    A `report` becomes report.json and the page report.html. With the `recipe` too there are recipe.yaml, a model card
    and the licence files of the source. With `healing`, a report of `heal` as plain data, and the name of its
    `teacher`, the folder has these files of the source with a section about healing. `files` are more texts by name.

    With `check_tokens` [batch, tokens], of which the first 128 are used, a fresh Python process loads the folder
    without optprune, a block at a time, with the modelling file in the folder where the shapes are not stock. Its
    logits must agree with those in memory; otherwise the folder stays under a name that ends with ".unchecked".

    A `dtype` other than auto (float32, bfloat16 or float16) rounds the model in place before. A `LoadedModel` brings
    its tokenizer and the store of its blocks. Where the weights are more than `max_shard_size`, files `made` that hold
    a block each are linked instead of copied. The language part of a vision-language model, with `whole` in the
    `LoadedModel`, is written into a copy of its folder.
    """
    check_apart(folder, [teacher])
    loaded = model if isinstance(model, LoadedModel) else LoadedModel(model, tokenizer, "")
    loaded = replace(loaded, tokenizer=tokenizer or loaded.tokenizer)
    if loaded.whole is None:
        stand_alone(loaded.model.config)
    texts = dict(files or {})
    if report is not None and recipe is not None:
        texts |= pruned_files(loaded, report, recipe)
    if healing is not None:
        texts |= healed_files(loaded.source, healing, teacher)
    exporter = TransformersFolder(
        dtype=dtype,
        max_shard_size=max_shard_size,
        check_tokens=check_tokens,
        checks=check_tokens is not None,
        files=texts,
        report=report,
        healed=healing is not None,
        made=made,
        place=str(folder),
    )
    done = export(loaded, folder, exporter, overwrite=overwrite, on_event=on_event)
    whole = report and replace(report, phases=joined(report.phases, done.phases))
    # The checks have split the experts of a mixture; the caller gets the model as transformers holds it.
    loaded.decoder().joined()
    return SavedModel(done.path, done.bytes, is_stock(loaded.model.config), done.logits_difference, whole)


def save_pruned(
    loaded: LoadedModel, folder: str | Path, report: Report, recipe: Recipe, *, window: Tensor, **options: Any
) -> SavedModel:
    """Save a pruned model. Deprecated: use `save_model`, which does the same."""
    sentence = "save_pruned is deprecated: call save_model(loaded, folder, report=..., recipe=..., check_tokens=...)"
    warnings.warn(sentence, DeprecationWarning, stacklevel=2)
    return save_model(loaded, folder, report=report, recipe=recipe, check_tokens=window[None], **options)


def pruned_files(loaded: LoadedModel, report: Report, recipe: Recipe) -> dict[str, str]:
    """Return the recipe, the model card and the licence files of a pruned model, by file name."""
    origin = origin_of(loaded.source)
    card = ModelCard(origin, report, loaded.model).text()
    return {**origin.licence_files, CARD: card, RECIPE: recipe.as_run(report.recipe).to_yaml()}


def healed_files(source: str, healing: Mapping[str, Any], teacher: str) -> dict[str, str]:
    """Return report, card, recipe and licence files of a model's source folder, with a section about healing."""
    found = {name: own_text(Path(source), name) for name in (REPORT, RECIPE, CARD)}
    try:
        before = json.loads(found[REPORT] or "{}")
    except (ValueError, RecursionError):
        before = {}
    origin = origin_of(source)
    card = found[CARD] or f"# {plain(origin.name.rpartition('/')[2])}\n"
    files = {
        **origin.licence_files,
        REPORT: json_text({**(before if isinstance(before, dict) else {}), "healing": dict(healing)}),
        CARD: healed_card(card, healing, origin_of(teacher).name),
    }
    recipe = found[RECIPE]
    return files if recipe is None else {**files, RECIPE: recipe}


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformersFolder(Exporter):
    """Model folder with safetensors weights, which a fresh process loads and compares with the original."""

    name: ClassVar[str] = "transformers"
    description: ClassVar[str] = "a folder for transformers and vLLM"
    noun: ClassVar[str] = "pruned model"
    keeps_unchecked: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True

    dtype: str = "auto"
    """auto (as it is), float32, bfloat16 or float16; a loaded model is rounded in place"""
    max_shard_size: str = MAX_SHARD_SIZE
    check_tokens: Tensor | None = None
    """token ids [batch, tokens] to compare logits on; by default drawn from the vocabulary"""
    checks: bool = True
    """whether the folder is loaded and compared"""
    files: Mapping[str, str] | None = None
    """further texts by file name; by default the licence files of the source"""
    report: Report | None = None
    """report of the pruning, written as report.json and report.html"""
    healed: bool = False
    """whether `files` hold a report with a section about healing, of which there is to be a page"""
    made: Sequence[Path] = ()
    """files that hold the tensors of a block each, and can be linked"""
    place: str = "."
    """the folder's path, as commands on the page have it"""

    def __post_init__(self) -> None:
        for name in self.files or ():
            if name in ("", ".", "..") or set("/\\\0") & set(name):
                raise InputError(f"the name {shown(name)} of a file of the folder is not plain: give it without a path")

    def unsupported(self, source: ModelSource) -> str | None:
        try:
            check_dtype(self.dtype)
            size_of(self.max_shard_size)
            if source.whole is not None:
                written = None if source.loaded is None else source.loaded.model.dtype
                check_around(source.whole, DTYPES.get(self.dtype, written))
        except InputError as error:
            return str(error)
        return None

    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        loaded = source.loaded or open_model(source.name, dtype=self.dtype, device="cpu", scratch=draft.parent)
        if source.loaded is not None and self.dtype != "auto":
            cast(loaded.model, DTYPES[self.dtype], loaded.store)
        if loaded.whole is None:
            stand_alone(loaded.model.config)
        decoder, begins, expected = loaded.decoder(), 0.0, None
        if self.checks:
            begins, ids = COMPUTED, self._check_tokens(loaded.model)
            ids = ids if loaded.whole is None else loaded.whole.without_images(ids)

            def on_block(done: int, blocks: int) -> None:
                step = "computing the logits to compare"
                on_event(PhaseAdvanced(SAVING, step, "block", done, blocks, ends=COMPUTED))

            expected = ids, logits_of(decoder, ids, on_block)

        def on_tensor(done: int, tensors: int) -> None:
            on_event(PhaseAdvanced(SAVING, "saving", "tensor", done, tensors, begins))

        if loaded.whole is None:
            write_configs(decoder.model, draft)
        else:
            write_around(loaded.whole, decoder.model.config, draft)
        write_weights(decoder, draft, size_of(self.max_shard_size), self.made, on_tensor, loaded.whole)
        write_rest(loaded, draft, origin_of(source.name).licence_files if self.files is None else self.files)
        if self.healed:
            _write_healed_page(draft, self.place)
        tokenizer = loaded.tokenizer is not None
        reports = self.report and _Reports.of(self.report, decoder, draft, tokenizer=tokenizer, place=self.place)
        size = file_bytes(str(draft))
        return Draft(draft, size, f"dtype {_name(loaded.model.dtype)}", expected=_Expected(decoder, expected, reports))

    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        expected: _Expected = draft.expected
        starting = "starting a process that reloads the folder"
        on_event(PhaseAdvanced(CHECKING, starting, "step", 0, 1, ends=STARTED))

        def on_block(done: int, blocks: int) -> None:
            if not done:
                on_event(PhaseAdvanced(CHECKING, starting, "step", 1, 1, ends=STARTED))
            on_event(PhaseAdvanced(CHECKING, "checking", "block", done, blocks, STARTED, COMPARED))

        assert expected.logits is not None
        return compare(expected.decoder, draft.path, *expected.logits, draft.path.parent, on_block)

    def record_phases(self, draft: Draft, phases: tuple[PhaseReport, ...]) -> None:
        if draft.expected.reports is not None:
            draft.expected.reports.write(draft.path, phases)

    def work(self, source: ModelSource) -> Work:
        decoder = source.shapes
        weights = sum(parameter.numel() for parameter in decoder.model.parameters())
        tokens = CHECK_TOKENS if self.check_tokens is None else self.check_tokens.numel()
        blocks = [decoder.weights_of(shape) for shape in decoder.shapes()]
        outside = weights - sum(blocks)
        # Both passes read each weight once for each token; a block and the rest are in memory, in this process and
        # in the one that checks.
        flops = 2 * 2 * tokens * weights if self.checks else 0
        return Work(flops=flops, bytes=(1 + self.checks) * decoder.model.dtype.itemsize * (outside + max(blocks)))

    def _check_tokens(self, model: PreTrainedModel) -> Tensor:
        if self.check_tokens is not None:
            return self.check_tokens[:, :CHECK_TOKENS]
        length = min(CHECK_TOKENS, getattr(model.config, "max_position_embeddings", None) or CHECK_TOKENS)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator)


@dataclass(frozen=True, eq=False)
class _Expected:
    """Values that a draft is checked and completed with."""

    decoder: Decoder
    logits: tuple[Tensor, Tensor] | None
    """token ids and the logits of the model in memory"""
    reports: "_Reports | None"


@dataclass(frozen=True)
class _Reports:
    """The files report.json and report.html, which are written again when the duration of the check is known."""

    report: Report
    held: ModelSummary
    drawn: Mapping[str, str] = field(default_factory=dict)
    """pictures of the page, which do not depend on the durations"""
    place: str = "."

    @classmethod
    def of(cls, report: Report, decoder: Decoder, folder: Path, *, tokenizer: bool, place: str) -> "_Reports":
        """Return the files for a folder that this model has been written to."""
        held = ModelSummary.of(decoder, report, file_bytes(str(folder)), tokenizer=tokenizer)
        return cls(report, held, pictures(report), place)

    def write(self, folder: Path, phases: Sequence[PhaseReport]) -> None:
        """Write both files, with these phases after those of the report."""
        whole = replace(self.report, phases=joined(self.report.phases, phases))
        texts = {REPORT: whole.to_json(), PAGE: page(whole, model=self.held, drawn=self.drawn, folder=self.place)}
        for name, text in texts.items():
            data = text.encode()
            write_whole(folder / name, lambda stream, data=data: stream.write(data), lasting=False)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write the files of a model other than its weights, which would all be in memory.

    The bar of transformers, which would count no shards on stderr, is off meanwhile.
    """
    shown, shown_by_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        if shown:
            logging.enable_progress_bar()
        if shown_by_hub:
            enable_progress_bars()
        elif shown:
            disable_progress_bars()


def write_rest(loaded: LoadedModel, draft: Path, files: Mapping[str, str]) -> None:
    """Write what a folder needs beside config and weights: the tokenizer, where it is not copied, and texts by name."""
    if loaded.whole is None:
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(draft)
        make_portable(draft, loaded.tokenizer)
    for name, text in files.items():
        (draft / name).write_text(text, encoding="utf-8")
    usual = draft.stat().st_mode & 0o666
    for file in draft.rglob("*"):
        # transformers makes some files private, which would surprise in a folder that is shared.
        if file.is_file():
            file.chmod(usual)


def _write_healed_page(folder: Path, place: str) -> None:
    """Write the page of a folder, unless its report is about healing alone."""
    report = read_run_report(folder)
    if report is None:
        return
    model, healing = summarise_model(folder, report), read_healing(folder)
    data = page(report, model=model, healing=healing, folder=place).encode()
    write_whole(folder / PAGE, lambda stream: stream.write(data))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast(model: PreTrainedModel, dtype: torch.dtype, store: BlockStore | None = None) -> None:
    """Round a model's weights to another dtype, in place. Raises InputError where a value is out of its range.

    Buffers that are not stored (the frequencies of rotary embeddings) stay as they are, as when a folder in that dtype
    is loaded. Where the blocks come from a `store`, each is read once to see that it can be rounded.
    """
    decoder, names = Decoder(model, store), {parameter: name for name, parameter in model.named_parameters()}
    exact = tuple(f".{name}" for name in decoder.architecture.float32)
    narrow = {parameter: name for parameter, name in names.items() if not (exact and name.endswith(exact))}
    values = {parameter: _rounded(name, parameter, dtype) for parameter, name in narrow.items()}
    for index in range(0 if store is None else len(decoder.blocks)):
        with decoder.resident(index) as block:
            for name, parameter in block.named_parameters():
                if name in decoder.architecture.float32:
                    continue
                _rounded(decoder.name(index, name), parameter, dtype)
    for parameter, value in values.items():
        parameter.data = value
    decoder.joined()
    if store is not None:
        store.dtype = dtype


def _rounded(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    value = parameter.detach()
    value = rounded(name, value, dtype, "save it as") if value.is_floating_point() else value
    if not value.is_meta and not all_finite(value):
        raise InputError(f"{name} holds NaN or infinity, so it is not saved: prune or train again")
    return value
