"""A run of the command line from a model source to a checked folder, in one process or in those of torchrun."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.cli.run_folder import Output, keep_or_delete, run_folder_of
from optprune.cli.tokens import calibration_of, vocabulary_for, with_digests

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.calibration.peers import Peers
    from optprune.cli.request import Resolved
    from optprune.export import SavedModel
    from optprune.models import ImageFeatures, LoadedModel
    from optprune.models.store import BlockSink
    from optprune.program import Program
    from optprune.pruning import Journal, PartialSums, Workers
    from optprune.report import Event, PhaseRecorder, Report, VocabularyChange
    from optprune.report.progress import Reporter
    from optprune.texts.in_memory import GivenCalibration
    from optprune.tokens import VocabularyPruning


@dataclass(frozen=True)
class Begun:
    """A run that has begun: its model is open, and what decides its bytes is recorded."""

    loaded: "LoadedModel"
    batches: "list[Tensor]"
    """the calibration, with the windows that the dense model generated"""
    facts: dict[str, Any]
    reading: float
    """the seconds in which all weights were read for the facts"""
    change: "VocabularyChange | None" = None
    """the record of a smaller vocabulary"""

    def pruned(self, program: "Program", **more: Any) -> "Report":
        """Prune the model in place and return the report; `more` are arguments of `run_program`."""
        from optprune.pruning import run_program

        began = time.perf_counter() - self.reading
        return run_program(program, self.loaded.decoder(), self.batches, facts=self.facts, began=began, **more)


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
    windows: "dict[str, Tensor]" = field(default_factory=dict)
    """windows that were generated already, by the fingerprint of the text that they continue"""
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

    def run_folder(self, peers: "Peers", say: Callable[[str], None]) -> "AbstractContextManager[Journal | None]":
        """Return the run folder, which the first process alone has; a `with` statement keeps or deletes it."""
        from optprune.pruning import Journal

        return nullcontext() if peers.rank else keep_or_delete(self.output.run_folder(Journal), say)

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
        import torch

        from optprune.calibration.generated import generated_windows, kept_or_new, with_generated
        from optprune.models import load_model
        from optprune.numerics.fingerprint import fingerprint
        from optprune.report import PhaseAdvanced
        from optprune.report.phases import GENERATING

        def on_part(done: int, total: int) -> None:
            if phases is not None:
                phases.on_event(PhaseAdvanced(GENERATING, "generating text", "part", done, total))

        seed = program.seed

        def generate() -> "Tensor":
            text = fingerprint(torch.cat(list(batches)))
            # Generating takes all processes, unless all have the windows.
            if not all(peers.all_gather(text in self.windows)):
                with nullcontext() if phases is None else phases.phase(GENERATING):
                    dense = load_model(self.model, **self._places).model
                    self.windows[text] = generated_windows(
                        dense, batches, self.generated, seed=seed, peers=peers, on_part=on_part
                    )
            return self.windows[text]

        windows = kept_or_new(journal, generate, peers)
        return with_generated(batches, windows, held_out=program.held_out, seed=seed)

    def begun(
        self,
        program: "Program",
        batches: "Sequence[Tensor]",
        partial_sums: "PartialSums",
        phases: "PhaseRecorder",
        journal: "Journal | None" = None,
    ) -> "Begun | None":
        """Open the model and begin the run; return None where this command has already finished the output.

        Every process of the run calls this, and only the first one has the journal. The run begins before the tokens
        of a smaller vocabulary are kept and text is generated, so that both can be used if it is killed.
        """
        from optprune.calibration.peers import from_first
        from optprune.models.store import NullSink
        from optprune.program import check_batches
        from optprune.pruning.run import OPENED, facts
        from optprune.pruning.shared import SharedJournal
        from optprune.report.phases import LOADING, VOCABULARY

        sink, scratch = (NullSink(), None) if journal is None else (journal.sink, journal.scratch)
        with phases.step(LOADING, f"loading {self.model}", ends=OPENED):
            loaded = replace(self.opened(sink, scratch), images=self.images)
        every = check_batches(loaded.model.config, batches, self.images)
        began = time.perf_counter()
        with phases.phase(LOADING):
            decided = facts(program, loaded.decoder(), every, partial_sums, phases.on_event)
        reading = time.perf_counter() - began

        def is_finished() -> bool:
            return journal is not None and self.output.may_be_finished and self.output.is_finished(journal, decided)

        if from_first(partial_sums.peers, is_finished):
            return None
        SharedJournal(journal, partial_sums.peers).begin(decided)
        from_first(partial_sums.peers, lambda: self._keep_tokens(journal))
        every = list(self.with_generated(program, every, partial_sums.peers, journal, phases))
        if self.vocabulary is None:
            return Begun(loaded, every, decided, reading)
        with phases.phase(VOCABULARY):
            loaded, change = self.vocabulary.apply(loaded, phases.on_event)
        return Begun(loaded, every, decided, reading, change)

    def _keep_tokens(self, journal: "Journal | None") -> None:
        """Write the tokens of a smaller vocabulary to the run folder, unless it holds them."""
        from optprune.pruning.journal import CHOSEN_TOKENS

        if journal is not None and self.vocabulary is not None and not journal.holds(CHOSEN_TOKENS):
            journal.write(CHOSEN_TOKENS, asdict(self.vocabulary.chosen()))

    def run(
        self,
        program: "Program",
        batches: "Sequence[Tensor]",
        *,
        reporter: "Reporter",
        phases: "PhaseRecorder",
        calibration: str,
        window: "Tensor",
        partial_sums: "PartialSums",
        journal: "Journal",
    ) -> "tuple[Report, SavedModel | None]":
        """Load, prune, save and check; `calibration` names the text that the batches are from.

        The report has the phases of the recorder and those that follow. Where this command has already finished the
        output, that report is returned and nothing is saved.
        """
        from optprune.calibration.generated import described
        from optprune.export import save_model
        from optprune.report import joined, read_report

        begun = self.begun(program, batches, partial_sums, phases, journal)
        self.output.delete_left_behind(reporter.say)
        if begun is None:
            return read_report(self.output.folder), None
        report = begun.pruned(
            program,
            on_event=phases.on_event,
            source=self.model,
            calibration=described(calibration, self.generated),
            journal=journal,
            workers=self.workers,
            partial_sums=partial_sums,
        )
        report = replace(report.with_vocabulary(begun.change), phases=joined(phases.done, report.phases))
        reporter.say(f"saving to {self.output.folder}, and reloading it in a fresh process to compare logits")
        saved = save_model(
            begun.loaded,
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
    given: "GivenCalibration | None" = None,
    reporter: "Reporter",
    started: float,
    partial_sums: int | None = None,
    planned: bool = True,
    also: "Callable[[Event], None]" = lambda event: None,
) -> "tuple[Report, SavedModel | None] | None":
    """Do the resolved run on a text; `data` is its name and the kind of its windows ("packed" or "whole").

    The text is read by its name, unless it is `given` in memory, perhaps as its tokens alone.

    `started` is the number of seconds since the process began, and `also` receives the events of the run. If `planned`,
    a run that exceeds the memory or the disk raises InputError before it starts. Returns None in all but the first of
    the processes that share the run.
    """
    from optprune.models import device_of
    from optprune.program.room import Room, check_room, placed
    from optprune.program.time import expected_seconds
    from optprune.pruning import joined
    from optprune.report import PhaseRecorder
    from optprune.report.phases import TOKENISING
    from optprune.texts import read_texts

    calibration, sequences = data
    whole.check_run(resolved.program)
    named = given is None and resolved.records is None
    texts = read_texts(calibration) if named else list(given.texts if given else ())
    resolved = with_digests(resolved, texts)
    request = (program := resolved.program).request
    if request.text is not None:
        whole.check_run(program)
    resolved.report_notes(reporter.say)
    characters = sum(text.characters for text in texts)
    # Processes join first, so that each has its own GPU from here on.
    with joined(whole.device) as peers:
        device = device_of(whole.device)
        samples, generated = -(-request.samples // peers.size), -(-request.generated // peers.size)
        own = replace(program, request=replace(request, samples=samples, generated=generated))
        room = Room.measured(device, whole.output.folder, run_folder_of(whole.output.folder))
        if planned:
            reporter.say(check_room(own, room))
        program = replace(program, request=replace(request, states=placed(own, room).request.states))
        expected = expected_seconds(program, characters, device, started=started)
        with reporter.events(expected) as show:

            def on_event(event: "Event") -> None:
                show(event)
                also(event)

            phases = PhaseRecorder(device, on_event)
            with whole.run_folder(peers, reporter.say) as journal:
                smaller = vocabulary_for(resolved, texts, whole.opened, journal=journal, peers=peers, phases=phases)
                with phases.step(TOKENISING, f"tokenising {calibration}"):
                    drawn = (given and given.windows) or calibration_of(resolved, texts, sequences, smaller)
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
                    journal=journal,
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
    journal: "Journal | None",
) -> "tuple[Report, SavedModel | None] | None":
    """Do the run with this many partial sums, by default one for each process; return None in all but the first."""
    from optprune.pruning import PartialSums

    shared = PartialSums(peers.size if partial_sums is None else partial_sums, peers)
    batches = _one_per_sum(batches, shared.count)
    shared.check(batches)
    if journal is None:
        _take_part(whole, program, batches, shared, phases)
        return None
    return whole.run(
        program,
        batches,
        reporter=reporter,
        phases=phases,
        calibration=calibration,
        window=window,
        partial_sums=shared,
        journal=journal,
    )


def _one_per_sum(batches: "Sequence[Tensor]", partial_sums: int) -> "list[Tensor]":
    """Return the batches, split into smaller ones if there are fewer than partial sums."""
    import torch

    windows = [window for batch in batches for window in batch.split(1)]
    if len(batches) >= partial_sums or len(windows) < partial_sums:
        return list(batches)
    if len({window.shape for window in windows}) > 1:
        return windows
    return list(torch.cat(windows).split(len(windows) // partial_sums))


def _take_part(
    whole: WholeRun,
    program: "Program",
    batches: "Sequence[Tensor]",
    partial_sums: "PartialSums",
    phases: "PhaseRecorder",
) -> None:
    """Take part in a run without writing anything."""
    begun = whole.begun(program, batches, partial_sums, phases)
    if begun is not None:  # the first process found the output finished otherwise
        begun.pruned(program, workers=whole.workers, partial_sums=partial_sums)
