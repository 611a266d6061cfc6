"""A run of the command line: from a model source to a checked folder, with a journal beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.cli.run_folder import check_finished, check_resume, kept_in, run_folder_of, stored_facts
from optprune.system.files import real_path

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.allocation import Allocation
    from optprune.export import SavedModel
    from optprune.models import LoadedModel
    from optprune.models.store import BlockSink
    from optprune.pruning import Journal, Lanes, Workers
    from optprune.recipe import Recipe
    from optprune.report import Event, PhaseRecorder, Report
    from optprune.report.progress import Reporter


@dataclass(frozen=True)
class WholeRun:
    """Where a run reads and where it writes."""

    model: str
    dtype: str
    device: str
    output: Path
    overwrite: bool
    save_dtype: str
    max_shard_size: str
    resume: bool
    restart: bool
    workers: "Workers"
    states: str
    architecture: Path | None = None
    """the draft of the model's architecture"""

    def check(self) -> None:
        """Raise InputError where the options do not work, whatever the model and the text."""
        from optprune.export import check_output, check_own_files
        from optprune.export.shards import size_of
        from optprune.models import check_dtype, device_of
        from optprune.pruning import check_states

        check_resume(resume=self.resume, restart=self.restart)
        check_output(self.output, self.overwrite or self.goes_on_from_output)
        check_own_files(self.model)
        size_of(self.max_shard_size)
        for name in (self.dtype, self.save_dtype):
            check_dtype(name)
        device_of(self.device)
        check_states(self.states)

    @property
    def goes_on_from_output(self) -> bool:
        """Whether the output is there already, and the command may be one that has finished."""
        return self.resume and real_path(self.output).is_dir()

    def check_folder(self, recipe: "Recipe", allocation: "Allocation | None") -> None:
        """Raise InputError where the run could not use its folder, or an output that is there is another command's."""
        from optprune.pruning import Journal
        from optprune.pruning.facts import asked

        known = asked(recipe, allocation)
        Journal.check(run_folder_of(self.output), resume=self.resume, restart=self.restart, facts=known)
        if self.goes_on_from_output:
            check_finished(self.output, stored_facts(self.output), known, overwrite=self.overwrite)

    def _is_finished(
        self,
        journal: "Journal",
        loaded: "LoadedModel",
        batches: "Sequence[Tensor]",
        recipe: "Recipe",
        allocation: "Allocation | None",
        lanes: "Lanes",
        on_event: "Callable[[Event], None]",
    ) -> bool:
        """Return whether the output is there and this command made it, so that an unfinished run of it can go."""
        from optprune.pruning.facts import facts
        from optprune.pruning.preflight import check_batches

        every = check_batches(loaded.model.config, batches)
        decided = facts(loaded.decoder(), every, recipe, allocation, lanes, on_event)
        if not check_finished(self.output, stored_facts(self.output), decided, overwrite=self.overwrite):
            return False
        if journal.begun:
            journal.check_facts(decided)
        return True

    def opened(self, sink: "BlockSink", scratch: Path | None = None) -> "LoadedModel":
        """The model, whose blocks stay in its files."""
        from optprune.models import open_model

        places = {"dtype": self.dtype, "device": self.device, "architecture": self.architecture}
        return open_model(self.model, sink=sink, scratch=scratch, **places)  # type: ignore[arg-type]

    def run(
        self,
        reporter: "Reporter",
        phases: "PhaseRecorder",
        batches: "Sequence[Tensor]",
        recipe: "Recipe",
        allocation: "Allocation | None",
        calibration: str,
        *,
        window: "Tensor",
        lanes: "Lanes | None" = None,
    ) -> "tuple[Report, SavedModel | None]":
        """Load, prune, save and check; `calibration` says in words where the batches are from.

        The report has the phases that the recorder has, and those that follow. Where this command has finished the
        output already, that is its report, and nothing is saved.
        """
        from optprune.export import save_pruned
        from optprune.export.place import discard, left_behind
        from optprune.pruning import Journal, Lanes, prune
        from optprune.pruning.facts import OPENED
        from optprune.report import joined, read_report
        from optprune.report.phases import LOADING

        for folder in left_behind(real_path(self.output)):
            reporter.say(f"deleting {folder}, which a run that was killed has left behind")
            discard(folder)
        journal = Journal(run_folder_of(self.output), resume=self.resume, restart=self.restart)
        with kept_in(journal, reporter.say):
            with phases.step(LOADING, f"loading {self.model}", ends=OPENED):
                loaded = self.opened(journal.sink, journal.scratch)
            lanes = lanes or Lanes()
            if self.goes_on_from_output:
                with phases.phase(LOADING):
                    done = self._is_finished(journal, loaded, batches, recipe, allocation, lanes, phases.on_event)
                if lanes.peers.exchange(done)[0]:
                    return read_report(self.output), None
            report = prune(
                loaded.model,
                batches,
                recipe,
                allocation=allocation,
                on_event=phases.on_event,
                source=self.model,
                calibration=calibration,
                store=loaded.store,
                journal=journal,
                workers=self.workers,
                lanes=lanes,
                states=self.states,
            )
            report = replace(report, phases=joined(phases.done, report.phases))
            reporter.say(f"saving to {self.output}, and reloading it in a fresh process to compare logits")
            saved = save_pruned(
                loaded,
                self.output,
                report,
                recipe,
                window=window,
                overwrite=self.overwrite,
                dtype=self.save_dtype,
                max_shard_size=self.max_shard_size,
                made=journal.shards(),
                on_event=phases.on_event,
            )
        return saved.report or report, saved
