"""A run of the command line: from a model source to a checked folder, with a journal beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.cli.run_folder import journalled
from optprune.system.files import real_path

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.allocation import Allocation
    from optprune.export import SavedModel
    from optprune.models import LoadedModel
    from optprune.models.store import BlockSink
    from optprune.pruning import Lanes, Workers
    from optprune.recipe import Recipe
    from optprune.report import PhaseRecorder, Report
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

        check_output(self.output, self.overwrite)
        check_own_files(self.model)
        size_of(self.max_shard_size)
        for name in (self.dtype, self.save_dtype):
            check_dtype(name)
        device_of(self.device)
        check_states(self.states)

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
    ) -> "tuple[Report, SavedModel]":
        """Load, prune, save and check; `calibration` says in words where the batches are from.

        The report has the phases that the recorder has, and those that follow.
        """
        from optprune.export import save_pruned
        from optprune.export.place import discard, left_behind
        from optprune.pruning import prune
        from optprune.pruning.facts import OPENED
        from optprune.report import joined
        from optprune.report.phases import LOADING

        for folder in left_behind(real_path(self.output)):
            reporter.say(f"deleting {folder}, which a run that was killed has left behind")
            discard(folder)
        with journalled(self.output, resume=self.resume, overwrite=self.overwrite) as journal:
            with phases.step(LOADING, f"loading {self.model}", ends=OPENED):
                place = journal.folder
                loaded = self.opened(journal.sink, place)
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
