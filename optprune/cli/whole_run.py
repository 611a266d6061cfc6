"""A run of the command line: from a model source to a checked folder, with a journal beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.cli.run_folder import Output, kept_in

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.allocation import Allocation
    from optprune.export import SavedModel
    from optprune.models import LoadedModel
    from optprune.models.store import BlockSink
    from optprune.pruning import PartialSums, Workers
    from optprune.recipe import Recipe
    from optprune.report import PhaseRecorder, Report
    from optprune.report.progress import Reporter


@dataclass(frozen=True)
class WholeRun:
    """Where a run reads and where it writes."""

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

    def check(self) -> None:
        """Raise InputError where the options do not work, whatever the model and the text."""
        from optprune.export import check_own_files
        from optprune.export.shards import size_of
        from optprune.models import check_dtype, device_of
        from optprune.pruning import check_states

        self.output.check()
        check_own_files(self.model)
        size_of(self.max_shard_size)
        for name in (self.dtype, self.save_dtype):
            check_dtype(name)
        device_of(self.device)
        check_states(self.states)

    def check_run(self, recipe: "Recipe", allocation: "Allocation | None") -> None:
        """Raise InputError where the run could not go on in its folder, or an output is another command's."""
        from optprune.pruning import Journal
        from optprune.pruning.facts import asked

        self.output.check_run(Journal, asked(recipe, allocation))

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
        partial_sums: "PartialSums | None" = None,
    ) -> "tuple[Report, SavedModel | None]":
        """Load, prune, save and check; `calibration` says in words where the batches are from.

        The report has the phases that the recorder has, and those that follow. Where this command has finished the
        output already, that is its report, and nothing is saved.
        """
        from optprune.export import save_pruned
        from optprune.pruning import Journal, PartialSums, prune
        from optprune.pruning.facts import OPENED, facts
        from optprune.pruning.preflight import check_batches
        from optprune.report import joined, read_report
        from optprune.report.phases import LOADING

        partial_sums, may_be_finished = partial_sums or PartialSums(), self.output.may_be_finished
        with kept_in(self.output.run_folder(Journal, reporter.say), reporter.say) as journal:
            with phases.step(LOADING, f"loading {self.model}", ends=OPENED):
                loaded = self.opened(journal.sink, journal.scratch)
            if may_be_finished:
                with phases.phase(LOADING):
                    every = check_batches(loaded.model.config, batches)
                    decided = facts(loaded.decoder(), every, recipe, allocation, partial_sums, phases.on_event)
                if partial_sums.peers.all_gather(self.output.is_finished(journal, decided))[0]:
                    return read_report(self.output.folder), None
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
                partial_sums=partial_sums,
                states=self.states,
            )
            report = replace(report, phases=joined(phases.done, report.phases))
            reporter.say(f"saving to {self.output.folder}, and reloading it in a fresh process to compare logits")
            saved = save_pruned(
                loaded,
                self.output.folder,
                report,
                recipe,
                window=window,
                overwrite=self.output.overwrite,
                dtype=self.save_dtype,
                max_shard_size=self.max_shard_size,
                made=journal.shards(),
                on_event=phases.on_event,
            )
        return saved.report or report, saved
