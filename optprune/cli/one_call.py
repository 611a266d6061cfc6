"""One call that prunes a model and writes it to a folder, as the command `prune` does, or prunes a model in memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optprune.cli.outputs import started
from optprune.cli.prune_run import WholeRun, run_on_text
from optprune.cli.request import FIELDS, Options
from optprune.cli.run_folder import Output
from optprune.errors import InputError, check_kind
from optprune.export import save_model
from optprune.export.shards import size_of
from optprune.models import LoadedModel, check_dtype
from optprune.program import check_batches
from optprune.program.runtimes import runtime_called
from optprune.pruning import prune, workers_of
from optprune.recipe import Recipe
from optprune.report import Event, Report
from optprune.report.progress import Reporter
from optprune.system.environment import started_by_torchrun
from optprune.system.wording import shown
from optprune.texts.documents import IMAGES
from optprune.texts.in_memory import GivenCalibration

NOT_GIVEN = dict.fromkeys((*FIELDS, "strict", "allocation", "target", "architecture", "ray", "settings"))
"""the options of the command that are fields of the recipe here, or are left out"""


def prune_model(
    model: str | Path | PreTrainedModel | LoadedModel,
    recipe: str | Recipe = "fasp",
    *,
    calibration: str | Path | Iterable[str] | Iterable[Tensor | Mapping[str, Any]],
    output: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    effort: str = "standard",
    sparsity: float | None = None,
    fields: Mapping[str, Any] | None = None,
    samples: int = 128,
    seq_length: int = 2048,
    sequences: str = "packed",
    generated: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    save_dtype: str = "auto",
    target: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str = "5GB",
    progress: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    **more: Any,
) -> Report | None:
    """Prune a model on a text, write it to a folder that is checked by reloading it, and return the report.

    The model is a folder, a GGUF file or a name on the hub; or a model of transformers with its `tokenizer`, or what
    `load_model` returns, which is pruned in place, and written where there is an `output`. The recipe is a name, a YAML
    file or a Recipe, whose `fields` are replaced by their dotted names, as in `load_recipe`, or by keywords, as in
    `units="mlp"`. `calibration` takes the texts of the command's option, a list of texts, or token batches as `prune`
    does, such as a DataLoader of dicts with `input_ids` and `attention_mask`; their number and length are then those of
    the batches. `progress` prints what the command prints on stderr, and `on_event` receives the events of the run.

    Blocks of a folder or a name are in memory one at a time. Finished blocks are kept beside the output until it is
    whole, so that `resume=True` continues a run that was stopped. A run that does not fit the memory or the disk is
    refused before it starts. Raises an OptpruneError, and the output folder then does not exist; a model in memory may
    be partly pruned if that was during the run. Processes of torchrun share the run as those of the command do; all but
    the first return None.
    """
    kinds = (str, Path, PreTrainedModel, LoadedModel)
    check_kind("the model", model, kinds, "give a folder, a name, or a model of transformers (merge adapters first)")
    given = {"recipe": recipe, "effort": effort, "samples": samples, "seq_length": seq_length, "sparsity": sparsity}
    given |= {"sequences": sequences, "generated": generated, "device": device, "dtype": dtype, "target": target}
    given |= {"save_dtype": save_dtype, "workers": workers, "max_shard_size": max_shard_size, "states": "auto"}
    named = str(model) if isinstance(model, str | Path) else ""
    # What `fields` has is named in a refusal, so it comes last.
    options = Options.of(NOT_GIVEN | given | {"model": named}).with_fields(more).with_fields(fields or {})
    chosen = options.chosen()
    place = None if output is None else Output(Path(output), overwrite, resume, reads=(named,) if named else ())
    if named and (place is None or tokenizer is not None):
        problem = "is written to a folder: name it by output" if place is None else "brings its tokenizer: leave it out"
        raise InputError(f"the model {named} {problem}, or give a model in memory")
    reporter = Reporter(Console(stderr=True, quiet=not progress))
    if isinstance(model, str | Path):
        assert place is not None
        return _FromSource(options, chosen, place, sequences, on_event).prune(calibration, reporter)
    for name, value, usual in (("device", device, "auto"), ("dtype", dtype, "auto"), ("resume", resume, False)):
        if value != usual:
            raise InputError(f"{name} cannot be {shown(value)} for a model in memory: leave it out, or give a folder")
    loaded = model if isinstance(model, LoadedModel) else LoadedModel(model, None, model.config.name_or_path or "")
    loaded = replace(loaded, tokenizer=loaded.tokenizer if tokenizer is None else tokenizer)
    return _InMemory(options, chosen, place, sequences, on_event, loaded, progress).prune(calibration)


@dataclass(frozen=True, eq=False)
class _FromSource:
    """A run on a folder or a name, with the options that were checked."""

    options: Options
    recipe: Recipe
    output: Output
    sequences: str
    on_event: Callable[[Event], None]

    def prune(self, calibration: Any, reporter: Reporter) -> Report | None:
        """Prune the model into the output, and return the report; None in all but the first process of torchrun."""
        options, chosen = self.options, self.recipe
        whole = WholeRun(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            output=self.output,
            save_dtype=options.save_dtype,
            max_shard_size=options.max_shard_size,
            workers=workers_of(chosen.propagation, options.workers, None),
            states=options.states,
            generated=options.generated,
        )
        whole.check()
        held = None if isinstance(calibration, str | Path) else GivenCalibration.of(calibration)
        name = str(calibration) if held is None else held.name
        options = options.with_calibration(name, chosen) if held is None else replace(options, **held.size)
        windows = None if held is None else held.windows
        if windows is not None:
            _check_tokens_alone(chosen, options.generated)
        resolved = options.resolve(chosen)
        if windows is not None:
            check_batches(resolved.config, windows.batches)
        data = (name, self.sequences)
        done = run_on_text(whole, resolved, data, given=held, reporter=reporter, started=started(), also=self.on_event)
        if done is None:
            return None
        report, saved = done
        if saved is not None:
            resolved.check(self.output.folder)
        return report


def _check_tokens_alone(recipe: Recipe, generated: int) -> None:
    """Raise InputError where a run needs the text, and not its tokens alone."""
    if generated or recipe.vocabulary is not None:
        what = "a smaller vocabulary is chosen by" if recipe.vocabulary is not None else "generated windows continue"
        raise InputError(f"{what} a text, and the calibration is token batches: give texts")


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A run on a model in memory, with the options that were checked."""

    options: Options
    recipe: Recipe
    output: Output | None
    sequences: str
    on_event: Callable[[Event], None]
    loaded: LoadedModel
    progress: bool

    def prune(self, calibration: Any) -> Report:
        """Prune the model in place, write it where there is an output, and return the report."""
        options, loaded, decoder = self.options, self.loaded, self.loaded.decoder()
        self._check(calibration)
        workers = workers_of(self.recipe.propagation, options.workers, None)
        runtime = None if options.target is None else runtime_called(options.target)
        recipe = self.recipe if runtime is None else runtime.fitted(self.recipe, decoder)[0]
        drawn = GivenCalibration.of(calibration).drawn(
            loaded.tokenizer, options.samples, options.seq_length, recipe.seed, self.sequences
        )
        report = prune(
            loaded.model,
            drawn.batches,
            recipe,
            source=loaded.source,
            calibration=drawn.description,
            store=loaded.store,
            workers=workers,
            progress=self.progress,
            on_event=self.on_event,
        )
        if self.output is None:
            return report
        saved = save_model(
            loaded,
            self.output.folder,
            report=report,
            recipe=recipe,
            check_tokens=drawn.first[None],
            overwrite=self.output.overwrite,
            dtype=options.save_dtype,
            max_shard_size=options.max_shard_size,
            on_event=self.on_event,
        )
        if runtime is not None:
            runtime.check_folder(decoder, self.output.folder)
        return saved.report or report

    def _check(self, calibration: Any) -> None:
        """Raise InputError unless the model can be pruned and written with these options, whatever the tokens."""
        if self.options.generated:
            raise InputError(
                "generated windows need the dense model's own folder: leave generated out, or give the folder"
            )
        if self.loaded.tokenizer is not None:
            remedy = "give the tokenizer itself, e.g. AutoTokenizer.from_pretrained(NAME)"
            check_kind("the tokenizer", self.loaded.tokenizer, PreTrainedTokenizerBase, remedy)
        if isinstance(calibration, str) and calibration.startswith(IMAGES) and not Path(calibration).exists():
            raise InputError("records with images are read by the model's own folder: give the folder in place of it")
        if started_by_torchrun():
            raise InputError("a model in memory is pruned by one process: give its folder, or start without torchrun")
        size_of(self.options.max_shard_size)
        check_dtype(self.options.save_dtype)
        if self.output is not None:
            replace(self.output, reads=(self.loaded.source,)).check()
