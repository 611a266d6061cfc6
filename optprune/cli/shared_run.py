"""A run of the command line on the processes of torchrun; the first one writes and prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optprune.cli.whole_run import WholeRun

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.calibration.partial_sums import Peers
    from optprune.export import SavedModel
    from optprune.program import Program
    from optprune.pruning import PartialSums
    from optprune.report import PhaseRecorder, Report
    from optprune.report.progress import Reporter


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
    loaded = whole.opened(NullSink())
    if may_be_finished and partial_sums.peers.all_gather(None)[0]:
        return  # the first process found the output finished
    every = check_batches(loaded.model.config, batches)
    run_program(program, loaded.decoder(), every, workers=whole.workers, partial_sums=partial_sums)
