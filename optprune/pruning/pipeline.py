"""The pipeline: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

import time
from collections.abc import Callable, Iterable

from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import DenseStatistics, calibrating
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.models.store import BlockStore
from optprune.numerics.precision import full_precision
from optprune.pruning.following import followed
from optprune.pruning.journal import Journal
from optprune.pruning.layer import summary
from optprune.pruning.preflight import check_batches
from optprune.pruning.run import Run, warn_or_raise
from optprune.pruning.workers import Serial, Workers
from optprune.recipe import Recipe
from optprune.report import BlockChange, Event, PhaseRecorder, Report
from optprune.report.phases import PRUNING
from optprune.system.environment import versions

MISSED = (
    "the budget is not met: {:.2%} of the decoder's linear weights are gone, not {:.2%}, since answers keep more than "
    "they may: an objective of your own finds the number in context.keep"
)
"""the note of a run whose problems do not hold the budget"""


@full_precision()
def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    allocation: Allocation | None = None,
    statistics: DenseStatistics | None = None,
    on_event: Callable[[Event], None] | None = None,
    progress: bool = False,
    source: str = "",
    calibration: str = "",
    store: BlockStore | None = None,
    journal: Journal | None = None,
    workers: Workers | None = None,
    partial_sums: PartialSums | None = None,
    states: str = "auto",
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length].

    All tokens count, so batches must hold no padding; one tensor [batch, length] is one batch. Raises an OptpruneError
    that says why when the model, the recipe or the batches do not fit; the model in memory may then be half pruned. An
    `allocation` says what every block keeps, in place of the recipe's sparsity; the report's recipe says it then.
    `statistics` are those of the dense model, as `collect` gives them, where runs share them; without, this run
    measures its own. `source` and `calibration` name the model and the text in the report. A model that `open_model`
    gave comes with the `store` of its blocks, which are in memory one at a time; afterwards the store gives the pruned
    ones. With a `journal` every block is on the disk once it is finished, and a run that was stopped goes on where it
    was. `workers` prune blocks side by side, where blocks are independent by the policy (dense, intra), or share the
    layers of a block; the weights are those of a run without. Sums over batches are added in `partial_sums`, which
    processes may share: each calls this with the same arguments, but for the first one's journal. `states` says where
    the hidden states of the tokens are between two blocks: device, host, disk (in a file without a name, in the
    journal's folder where there is one), or auto, which is the first of these that has room enough. `on_event` hears
    how far the run is, and with `progress` that is shown on stderr, with the time left.
    """
    began, workers, partial_sums = time.perf_counter(), workers or Serial(), partial_sums or PartialSums()
    _check_hands(model, store, recipe, workers, partial_sums)
    decoder = Decoder(model, store)
    weights_before, shapes = decoder.linear_weights(), decoder.shapes()
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    every, allocation = check_batches(model.config, batches), allocation or recipe.given
    recipe, work = recipe.settled(), recipe.worked() if allocation is None else recipe
    with followed(progress, on_event, decoder, every, work, allocation) as listener:
        phases = PhaseRecorder(model.device, listener)
        run = Run.begin(decoder, every, work, allocation, statistics, phases, journal, states, partial_sums)
        with phases.phase(PRUNING), calibrating(decoder):
            workers.prune(run)
    divided, notes = run.allocation, run.notes
    recipe = recipe if allocation is None else recipe.with_given(divided)
    records = sorted(run.records, key=lambda record: record.index)
    layers = [layer for record in records for layer in record.layers]
    kept = decoder.linear_weights() - sum(record.zeros for record in records)
    most = sum(decoder.weights_of(block.shape) for block in divided.blocks) - sum(record.due for record in records)
    reached = 1 - kept / weights_before
    if kept > most:
        notes += warn_or_raise(recipe, (MISSED.format(reached, divided.sparsity),))
    blocks, left = tuple(map(BlockChange, shapes, decoder.shapes())), divided.with_shapes(decoder, weights_before)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=recipe.sparsity if allocation is None else divided.sparsity,
        sparsity_reached=reached,
        seconds=time.perf_counter() - began,
        floor_seconds=sum(record.floor_seconds for record in records),
        tokens=run.tokens,
        seed=recipe.seed,
        versions=versions(),
        layers=tuple(layers),
        notes=summary(layers) + notes,
        calibration=calibration,
        allocation=left.to_dict(),
        removed=run.division.removed,
        recovered=tuple(part for record in records for part in record.recovered),
        blocks=blocks,
        phases=phases.done,
        parameters_before=parameters_before,
        run_facts=run.facts,
    )


def _check_hands(
    model: PreTrainedModel, store: BlockStore | None, recipe: Recipe, workers: Workers, partial_sums: PartialSums
) -> None:
    """Raise InputError where the weights are not at hand, or there are workers that do not go with the run."""
    if store is None and any(weight.is_meta for weight in model.parameters()):
        raise InputError("the model's weights are not in memory: hand over the store that came with it from open_model")
    workers.check(recipe)
    if partial_sums.peers.size > 1 and not isinstance(workers, Serial):
        raise InputError("the processes that share the partial sums are the workers: leave other workers out")
