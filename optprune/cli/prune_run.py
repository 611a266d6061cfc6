"""A run of the command line from a model source to a checked folder, in one process or in those of torchrun."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.cli.run_folder import Output, keep_or_delete
from optprune.cli.tokens import calibration_of
from optprune.system.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.calibration.peers import Peers
    from optprune.cli.request import Resolved
    from optprune.export import SavedModel
    from optprune.models import ImageFeatures, LoadedModel
    from optprune.models.store import BlockSink
    from optprune.program import Program
    from optprune.pruning import Journal, PartialSums, Workers
    from optprune.report import Event, PhaseRecorder, Report
    from optprune.report.progress import Reporter
    from optprune.tokens import VocabularyPruning


@dataclass(frozen=True)
class WholeRun:
    """The inputs, the output and the settings of a run."""

    model: str
    dtype: str
    device: str
    output: Output
    save_dtype: str
    max_shard_size: str
    workers: "Workers"
    states: str
    architecture: Path | None = None
    """the draft of the model's architecture"""
    vocabulary: "VocabularyPruning | None" = None
    """the smaller vocabulary, where the recipe has one"""
    generated: int = 0
    """number of calibration windows that the dense model generates"""
    images: "ImageFeatures | None" = None
    """the features of images that token ids of the calibration are numbers of"""

    def check(self) -> None:
        """Raise InputError unless the options are valid, whatever the model and the text."""
        from optprune.export import check_own_files
        from optprune.export.around import check_around
        from optprune.export.shards import size_of
        from optprune.models import DTYPES, check_dtype, device_of, vision_folder
        from optprune.pruning import check_states

        self.output.check()
        check_own_files(self.model)
        size_of(self.max_shard_size)
        for name in (self.dtype, self.save_dtype):
            check_dtype(name)
        whole = vision_folder(self.model)
        if whole is not None:
            last = self.dtype if self.save_dtype == "auto" else self.save_dtype
            check_around(whole, DTYPES.get(last))
        device_of(self.device)
        check_states(self.states)

    def check_run(self, program: "Program") -> None:
        """Raise InputError unless the run can continue in its folder and the output is its own."""
        from optprune.pruning import Journal

        self.output.check_run(Journal, program.facts())

    def opened(self, sink: "BlockSink", scratch: Path | None = None) -> "LoadedModel":
        """Return the model, with the blocks left in its files."""
        from optprune.models import open_model

        return open_model(self.model, sink=sink, scratch=scratch, **self._places)

    @property
    def _places(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device, "architecture": self.architecture}

    def with_generated(
        self,
        program: "Program",
        batches: "Sequence[Tensor]",
        peers: "Peers",
        journal: "Journal | None" = None,
        phases: "PhaseRecorder | None" = None,
    ) -> "Sequence[Tensor]":
        """Return the batches with the windows that the dense model generates, which a run that was begun has kept."""
        if not self.generated:
            return batches
        from optprune.calibration.generated import generated_windows, kept_or_new, with_generated
        from optprune.models import load_model
        from optprune.report import PhaseAdvanced
        from optprune.report.phases import GENERATING

        def on_part(done: int, total: int) -> None:
            if phases is not None:
                phases.on_event(PhaseAdvanced(GENERATING, "generating text", "part", done, total))

        seed = program.seed

        def generate() -> "Tensor":
            with nullcontext() if phases is None else phases.phase(GENERATING):
                dense = load_model(self.model, **self._places).model
                return generated_windows(dense, batches, self.generated, seed=seed, peers=peers, on_part=on_part)

        windows = kept_or_new(journal, generate, peers)
        return with_generated(batches, windows, held_out=program.held_out, seed=seed)

    def run(
        self,
        program: "Program",
        batches: "Sequence[Tensor]",
        *,
        reporter: "Reporter",
        phases: "PhaseRecorder",
        calibration: str,
        window: "Tensor",
        partial_sums: "PartialSums | None" = None,
    ) -> "tuple[Report, SavedModel | None]":
        """Load, prune, save and check; `calibration` names the text that the batches are from.

        The report has the phases of the recorder and those that follow. Where this command has already finished the
        output, that report is returned and nothing is saved.
        """
        from optprune.export import save_model
        from optprune.program import check_batches
        from optprune.pruning import Journal, PartialSums, run_program
        from optprune.pruning.run import OPENED, facts
        from optprune.report import joined, read_report
        from optprune.report.phases import LOADING, VOCABULARY

        partial_sums, may_be_finished = partial_sums or PartialSums(), self.output.may_be_finished
        with keep_or_delete(self.output.run_folder(Journal, reporter.say), reporter.say) as journal:
            batches = self.with_generated(program, batches, partial_sums.peers, journal, phases)
            if self.generated:
                calibration += f", and {counted(self.generated, 'window')} that the dense model generated"
            with phases.step(LOADING, f"loading {self.model}", ends=OPENED):
                loaded = replace(self.opened(journal.sink, journal.scratch), images=self.images)
            change = None
            if self.vocabulary is not None:
                with phases.phase(VOCABULARY):
                    loaded, change = self.vocabulary.apply(loaded, phases.on_event)
            every = check_batches(loaded.model.config, batches, self.images)
            if may_be_finished:
                with phases.phase(LOADING):
                    decided = facts(program, loaded.decoder(), every, partial_sums, phases.on_event)
                if partial_sums.peers.all_gather(self.output.is_finished(journal, decided))[0]:
                    return read_report(self.output.folder), None
            report = run_program(
                program,
                loaded.decoder(),
                every,
                on_event=phases.on_event,
                source=self.model,
                calibration=calibration,
                journal=journal,
                workers=self.workers,
                partial_sums=partial_sums,
            )
            report = replace(report.with_vocabulary(change), phases=joined(phases.done, report.phases))
            reporter.say(f"saving to {self.output.folder}, and reloading it in a fresh process to compare logits")
            saved = save_model(
                loaded,
                self.output.folder,
                report=report,
                recipe=program.request.recipe,
                check_tokens=window[None],
                overwrite=self.output.overwrite,
                dtype=self.save_dtype,
                max_shard_size=self.max_shard_size,
                made=journal.shards(),
                on_event=phases.on_event,
            )
        return saved.report or report, saved


def run_on_text(
    whole: WholeRun,
    resolved: "Resolved",
    data: tuple[str, str],
    *,
    reporter: "Reporter",
    started: float,
    partial_sums: int | None = None,
    planned: bool = True,
    also: "Callable[[Event], None]" = lambda event: None,
) -> "tuple[Report, SavedModel | None] | None":
    """Do the resolved run on a text; `data` is its name and the kind of its windows ("packed" or "whole").

    `started` is the number of seconds since the process began, and `also` receives the events of the run. If `planned`,
    a run that exceeds the memory or the disk raises InputError before it starts. Returns None in all but the first of
    the processes that share the run.
    """
    from optprune.models import device_of
    from optprune.program.room import Room, check_room
    from optprune.program.time import expected_seconds
    from optprune.pruning import joined
    from optprune.report import PhaseRecorder
    from optprune.report.phases import TOKENISING
    from optprune.texts import read_texts

    whole.check_run(program := resolved.program)
    (calibration, sequences), request = data, program.request
    texts = read_texts(calibration) if resolved.records is None else []
    resolved.report_notes(reporter.say)
    characters = sum(text.characters for text in texts)
    # Processes join first, so that each has its own GPU from here on.
    with joined(whole.device) as peers:
        device = device_of(whole.device)
        if planned:
            own = replace(request, samples=-(-request.samples // peers.size))
            reporter.say(check_room(replace(program, request=own), Room.measured(device, whole.output.folder)))
        expected = expected_seconds(program, characters, device, started=started)
        with reporter.events(expected) as show:

            def on_event(event: "Event") -> None:
                show(event)
                also(event)

            phases = PhaseRecorder(device, on_event)
            with phases.step(TOKENISING, f"tokenising {calibration}"):
                smaller, drawn = calibration_of(resolved, texts, sequences)
            del texts
            return shared_run(
                replace(whole, vocabulary=smaller, images=drawn.images),
                program,
                drawn.batches,
                partial_sums=partial_sums,
                peers=peers,
                reporter=reporter,
                phases=phases,
                calibration=drawn.description,
                window=drawn.first,
            )


def shared_run(
    whole: WholeRun,
    program: "Program",
    batches: "Sequence[Tensor]",
    *,
    partial_sums: int | None,
    peers: "Peers",
    reporter: "Reporter",
    phases: "PhaseRecorder",
    calibration: str,
    window: "Tensor",
) -> "tuple[Report, SavedModel | None] | None":
    """Do the run with this many partial sums, by default one for each process; return None in all but the first."""
    from optprune.pruning import PartialSums

    shared = PartialSums(peers.size if partial_sums is None else partial_sums, peers)
    batches = _one_per_sum(batches, shared.count)
    shared.check(batches)
    if peers.rank:
        _take_part(whole, program, batches, shared)
        return None
    return whole.run(
        program, batches, reporter=reporter, phases=phases, calibration=calibration, window=window, partial_sums=shared
    )


def _one_per_sum(batches: "Sequence[Tensor]", partial_sums: int) -> "list[Tensor]":
    """Return the batches, split into smaller ones if there are fewer than partial sums."""
    import torch

    windows = [window for batch in batches for window in batch.split(1)]
    if len(batches) >= partial_sums or len(windows) < partial_sums:
        return list(batches)
    return list(torch.cat(windows).split(len(windows) // partial_sums))


def _take_part(whole: WholeRun, program: "Program", batches: "Sequence[Tensor]", partial_sums: "PartialSums") -> None:
    """Take part in a run without writing anything."""
    from optprune.models.store import NullSink
    from optprune.program import check_batches
    from optprune.pruning import run_program

    may_be_finished = whole.output.may_be_finished
    batches = whole.with_generated(program, batches, partial_sums.peers)
    loaded = whole.opened(NullSink())
    if whole.vocabulary is not None:
        loaded, _ = whole.vocabulary.apply(loaded)
    if may_be_finished and partial_sums.peers.all_gather(None)[0]:
        return  # the first process found the output finished
    every = check_batches(loaded.model.config, batches)
    run_program(program, loaded.decoder(), every, workers=whole.workers, partial_sums=partial_sums)
